"""Tokenizing in parallel processes: batches of documents in, arrays of tokens out, in the same order."""

import hashlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import tokenizers

from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.errors import UserError


@dataclass(frozen=True)
class TextBatch:
    """Documents to tokenize; `number` is the place of the first one in its source, `position` where to read on."""

    texts: list[str]
    number: int
    position: dict


@dataclass(frozen=True)
class TokenBatch:
    """Documents tokenized.

    tokens: (sum of lengths,) every document closed by the end-of-document id. lengths: (documents,) int64.
    digests: (documents, 2) uint64, 128-bit hash of each text. bytes: UTF-8, of all texts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    bytes: int


def digest(text: bytes) -> bytes:
    """128-bit hash of a document's text."""
    return hashlib.blake2b(text, digest_size=16).digest()


def tokenize(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype) -> TokenBatch:
    """Tokenize a batch of documents in this process."""
    encoded = [text.encode(errors="replace") for text in texts]
    documents = [np.frombuffer(ids, dtype=np.uint32).astype(dtype) for ids in tokenizer.encode_documents(texts)]
    return TokenBatch(
        tokens=np.concatenate([np.empty(0, dtype), *documents]),
        lengths=np.array([len(document) for document in documents], dtype=np.int64),
        digests=np.frombuffer(b"".join(map(digest, encoded)), dtype="<u8").reshape(-1, 2),
        bytes=sum(map(len, encoded)),
    )


_worker: tuple[Tokenizer, np.dtype]


def _start_worker(tokenizer_json: str, end_of_document: str, dtype: np.dtype) -> None:
    global _worker
    # A worker is one core's share; threads inherited over a fork would not run anyway.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threading.Thread(target=_follow_parent, args=[os.getppid()], daemon=True).start()
    _worker = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json), end_of_document), dtype


def _follow_parent(parent: int) -> None:
    """End this process when its parent was killed, which a worker that waits for work would never notice."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(texts: list[str]) -> TokenBatch:
    return tokenize(_worker[0], texts, _worker[1])


class TokenizingPool:
    """Worker processes that tokenize; use as a context manager.

    Args:
        tokenizer: what they tokenize with.
        dtype: of the tokens.
        workers: processes.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, workers: int):
        self.workers = workers
        self._arguments = tokenizer.backend.to_str(), tokenizer.end_of_document, dtype
        self._executor = self._start(workers)

    def __enter__(self) -> "TokenizingPool":
        return self

    def __exit__(self, *exception) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _start(self, workers: int) -> ProcessPoolExecutor:
        # Forked, so that a program that uses the library needs no guard around its main part.
        executor = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, self._arguments)
        executor.submit(int)  # forks all of them now, before the caller starts threads
        return executor

    def map(self, batches: Iterable[TextBatch]) -> Iterator[tuple[TextBatch, TokenBatch]]:
        """Tokenize batches, a bounded number ahead of the one handed out.

        Raises:
            UserError: a worker died; names the document that kills it, if one does.
        """
        ahead: deque[tuple[TextBatch, Future]] = deque()
        try:
            for batch in batches:
                ahead.append((batch, self._executor.submit(_work, batch.texts)))
                if len(ahead) > 2 * self.workers:
                    yield ahead[0][0], ahead[0][1].result()
                    ahead.popleft()
            while ahead:
                yield ahead[0][0], ahead[0][1].result()
                ahead.popleft()
        except BrokenProcessPool as error:
            raise UserError(self._explain([batch for batch, _ in ahead])) from error

    def _explain(self, batches: list[TextBatch]) -> str:
        """Find the document that kills a worker, by trying again whatever was under way."""
        for batch in batches:
            if self._survives(batch.texts):
                continue
            for place, text in enumerate(batch.texts):
                if not self._survives([text]):
                    return (
                        f"document {batch.number + place} kills the process that tokenizes it; it has {len(text):,} "
                        f"characters and begins with {text[:60]!r}; leave it out of the source and run the same "
                        "command again, which continues where it stopped"
                    )
        return (
            "a tokenizing process was killed from outside (out of memory?), no document does it by itself; run the "
            "same command again, with fewer workers=N if need be: it continues where it stopped"
        )

    def _survives(self, texts: list[str]) -> bool:
        with self._start(workers=1) as executor:
            try:
                executor.submit(_work, texts).result()
            except BrokenProcessPool:
                return False
            return True
