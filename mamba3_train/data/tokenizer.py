"""Text to token ids and back: a thin layer over `tokenizers` that knows where a document ends."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mamba3_train.data.corpus_files import LocalFiles, RemoteFiles, corpus_files
from mamba3_train.errors import UserError

FILE_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"

# Documents encoded at a time: `tokenizers` keeps many times the ids of each, and what it keeps of a few stays in cache.
TOGETHER = 8

# How the public tokenizers call the token that closes a document, most usual first.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer:
    """A `tokenizers` tokenizer with an end-of-document token.

    Args:
        backend: the `tokenizers.Tokenizer`.
        end_of_document: the token written after every document; found by its usual names when not given.

    Raises:
        UserError: the vocabulary has no such token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_of_document: str | None = None):
        candidates = (end_of_document,) if end_of_document else END_OF_DOCUMENT_NAMES
        name = next((name for name in candidates if backend.token_to_id(name) is not None), None)
        if name is None:
            raise UserError(
                f"the tokenizer has no end-of-document token: looked for {', '.join(candidates)}; "
                "name one of its tokens by tokenizer.end_of_document=TOKEN"
            )
        # A document that quotes a special token is text about it: it must not end the document.
        backend.encode_special_tokens = True
        self.backend = backend
        self.end_of_document = name
        self.end_of_document_id = backend.token_to_id(name)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, end_of_document: str | None = None, show_progress: bool = False
    ) -> "Tokenizer":
        """Learn a byte-level BPE of exactly `vocab_size` entries (fewer only if the text has no more pairs)."""
        special = end_of_document or END_OF_DOCUMENT_NAMES[0]
        if vocab_size < 257:
            raise UserError(f"tokenizer.train.vocab_size={vocab_size}: a byte-level vocabulary needs at least 257")
        # Training is threaded; without a stated choice `tokenizers` warns at every later fork of a loader worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, special)

    @classmethod
    def from_file(cls, path: str | Path, end_of_document: str | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one inside a folder."""
        path = Path(path)
        return cls(_read(path / FILE_NAME if path.is_dir() else path), end_of_document)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer | None":
        """The tokenizer of a model's folder, as `documents` and the Hugging Face libraries write it; None without."""
        folder = Path(folder)
        if not (folder / FILE_NAME).is_file():
            return None
        backend = _read(folder / FILE_NAME)
        end = _end_of_document_setting(folder / SETTINGS_NAME)
        return cls(backend, end if end and backend.token_to_id(end) is not None else None)

    @classmethod
    def of_corpus(cls, corpus: "str | Path | LocalFiles | RemoteFiles", end_of_document_id: int) -> "Tokenizer":
        """Read the tokenizer of a prepared corpus, whose manifest knows the end-of-document id."""
        files = corpus_files(corpus)
        try:
            backend = tokenizers.Tokenizer.from_buffer(files.read(FILE_NAME))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{files}/{FILE_NAME} is not a tokenizer.json that can be read ({error})") from error
        return cls(backend, backend.id_to_token(end_of_document_id))

    @classmethod
    def from_hub(cls, name: str, end_of_document: str | None = None) -> "Tokenizer":
        """Fetch a tokenizer from the Hugging Face hub (or its local cache) by repository name."""
        try:
            backend = tokenizers.Tokenizer.from_pretrained(name)
        except Exception as error:  # the library raises plain Exception
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"tokenizer {name!r} cannot be had from the hub ({reason}); check the name and the network, log in "
                "with `hf auth login` if it is gated, or give a local file by tokenizer.file=PATH/tokenizer.json"
            ) from error
        return cls(backend, end_of_document)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids: equal fingerprints mean equal tokens."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def documents(self) -> dict[str, str]:
        """Contents by file name of what a model's folder holds of its tokenizer, in the Hugging Face layout."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_of_document,
            "pad_token": self.end_of_document,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        return {FILE_NAME: self.backend.to_str(pretty=True), SETTINGS_NAME: json.dumps(settings, indent=1) + "\n"}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as `tokenizer.json` at `path`."""
        self.backend.save(str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> Iterator[array]:
        """Ids of each document, closed by the end-of-document id, as arrays of uint32."""
        for begin in range(0, len(texts), TOGETHER):
            for encoding in self.backend.encode_batch_fast(texts[begin : begin + TOGETHER], add_special_tokens=False):
                ids = array("I", encoding.ids)
                ids.append(self.end_of_document_id)
                yield ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of a sequence of ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def _end_of_document_setting(path: Path) -> str | None:
    """The eos_token of a tokenizer_config.json, plain or with its flags; None where nothing names one."""
    try:
        token = json.loads(path.read_text())["eos_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"tokenizer file not found: {path}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"not a tokenizer.json that `tokenizers` can read: {path} ({error})") from error
