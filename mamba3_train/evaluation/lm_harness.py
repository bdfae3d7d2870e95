"""EleutherAI's lm-evaluation-harness on a model of ours; the one module that knows it (optional package lm-eval)."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mamba3_train.errors import UserError

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise UserError(
        f"tasks of lm-evaluation-harness need it: pip install 'mamba3-train[evaluate]' ({missing})"
    ) from missing


FEWSHOT_SEED = 1234
"""Chooses the examples before a question: the harness's own default."""
BOOTSTRAP = 100
"""Samples for the standard error of a metric that is no mean."""


class HarnessModel(TemplateLM):
    """A model as the harness sees it.

    Every rank is given all requests. Their batches, longest first, are dealt out to ranks, every rank makes as many
    passes, and all of them end with all answers: this holds for models in shards too.

    Args:
        forward: (batch, tokens) int64 → logits of at least the vocabulary.
        tokenizer: `data.tokenizer.Tokenizer`.
        device: where the model is.
        max_length: most tokens in one pass; a longer context loses its beginning.
        tokens_per_batch: most tokens in one pass, over all rows of it.
        generate: (prompts, max_new_tokens, stop, temperature) → continuations. Ranks continue prompts of their own, in
            any number of passes: not for models in shards.
        show_progress: a bar for the scoring, on rank 0.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        tokenizer,
        device: torch.device,
        *,
        max_length: int,
        tokens_per_batch: int,
        generate: Callable[[list[str], int, list[str], float], list[str]] | None = None,
        show_progress: bool = False,
    ):
        super().__init__()
        self.forward, self.text_tokenizer = forward, tokenizer
        self._device = device
        self.max_length, self.tokens_per_batch = max_length, tokens_per_batch
        self._generate, self.show_progress = generate, show_progress

    @property
    def eot_token_id(self) -> int:
        """What ends a document, and stands before a text that has no context."""
        return self.text_tokenizer.end_of_document_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of a text, without any special token."""
        return self.text_tokenizer.encode(string)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows where they are longer than a pass."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string."""
        if self._generate is None:
            raise UserError("tasks that generate text cannot be evaluated here: choose tasks that score given answers")
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.args[1]
            until = settings.get("until") or []
            stop = tuple([until] if isinstance(until, str) else until)
            temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
            key = int(settings.get("max_gen_toks", 256)), stop, temperature
            groups.setdefault(key, []).append(number)
        found: dict[int, str] = {}
        for (most, stop, temperature), numbers in groups.items():
            mine = numbers[_rank() :: _ranks()]
            prompts = [self._fit(requests[number].args[0], self.max_length - most) for number in mine]
            found.update(zip(mine, self._generate(prompts, most, list(stop), temperature), strict=True))
        return _of_all_ranks(found)

    def _fit(self, text: str, most: int) -> str:
        """The end of a text that is too long."""
        ids = self.tok_encode(text)
        return text if len(ids) <= max(most, 1) else self.text_tokenizer.decode(ids[-max(most, 1) :])

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the likeliest at every token."""
        rows = []
        for _, context, continuation in requests:
            most = max(self.max_length, len(continuation)) + 1
            rows.append(((context + continuation)[-most:], len(continuation)))
        batches = in_batches([len(tokens) - 1 for tokens, _ in rows], self.tokens_per_batch)
        found: dict[int, tuple[float, bool]] = {}
        for batch in _bar(dealt_out(batches), self.show_progress):
            answers = self._score([rows[number] for number in batch])
            found.update(zip(batch, answers, strict=True))
        return _of_all_ranks(found)

    @torch.no_grad()
    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        longest = max(len(tokens) - 1 for tokens, _ in rows)
        # What is to the right of a token does not reach it.
        inputs = torch.tensor([tokens[:-1] + [0] * (longest + 1 - len(tokens)) for tokens, _ in rows])
        logits = self.forward(inputs.to(self._device))[..., : self.text_tokenizer.vocab_size]
        answers = []
        for (tokens, count), row in zip(rows, logits, strict=True):
            end = len(tokens) - 1
            targets = torch.tensor(tokens[-count:], device=row.device)
            predicted = row[end - count : end]
            scores = torch.promote_types(row.dtype, torch.float32)
            values = predicted.to(scores).log_softmax(-1).gather(1, targets.unsqueeze(1))
            answers.append((float(values.sum()), bool((predicted.argmax(-1) == targets).all())))
        return answers


def in_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Numbers of the rows, longest first, in batches of at most so many tokens, padding included (or of one row)."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if not batches or (len(batches[-1]) + 1) * max(lengths[batches[-1][0]], 1) > tokens_per_batch:
            batches.append([])
        batches[-1].append(number)
    return batches


def dealt_out(batches: list[list[int]]) -> list[list[int]]:
    """This rank's batches: as many on every rank, so some batches are computed twice."""
    return [batches[min(first + _rank(), len(batches) - 1)] for first in range(0, len(batches), _ranks())]


def load_tasks(tasks: Sequence[str], *, include_path: str | Path | None = None, num_fewshot: int | None = None) -> dict:
    """Tasks and their data, for `evaluate_tasks`.

    Args:
        tasks: their names, or those of groups.
        include_path: folder with tasks of one's own, as yaml.
        num_fewshot: examples before each question; None takes the task's own number.

    Raises:
        UserError: an unknown task, or one whose data cannot be had.
    """
    # The harness's own thousands are read only where a task is not among those of include_path.
    for with_defaults in (False, True) if include_path else (True,):
        manager = TaskManager(include_path=include_path and str(include_path), include_defaults=with_defaults)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if not unknown:
            break
    if unknown:
        raise UserError(
            f"lm-evaluation-harness has no task {unknown[0]}: `lm-eval ls tasks` lists them; for one of your own give "
            "include_path=FOLDER"
        )
    with _one_rank_after_the_other():
        loaded = _load(manager, tasks)
    for task in loaded["tasks"].values():
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def evaluate_tasks(model: HarnessModel, loaded: dict, *, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Results of the harness by task: `{task: {metric: value, metric_stderr: value, …}}`, the same on every rank.

    Args:
        loaded: what `load_tasks` gave; it may be evaluated several times.
        limit: documents of each task; None takes all.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = lm_eval.evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    return {name: _plain(values) for name, values in results["results"].items()}


def _load(manager: TaskManager, tasks: Sequence[str]) -> dict:
    try:
        return manager.load(list(tasks))
    except Exception as error:  # the hub, the network and the data sets library raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be had ({reason}): it comes from the Hugging Face hub once, then "
            "from its cache; check the network, or fetch it on another machine and set HF_HOME"
        ) from error


def _plain(values: dict) -> dict[str, float]:
    """Metrics by name: the harness writes `acc,none`, the filter after the comma."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none").replace(",none", ""): value for key, value in numbers.items()}


@contextlib.contextmanager
def _one_rank_after_the_other():
    """Let the first rank of a machine fill the cache that the others then read."""
    if not dist.is_initialized():
        yield
        return
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        dist.barrier()
    try:
        yield
    finally:
        if first:
            dist.barrier()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _of_all_ranks(mine: dict[int, object]) -> list:
    """Answers by the number of their request, from all ranks, in order."""
    parts: list[dict] = [mine] * _ranks()
    if _ranks() > 1:
        dist.all_gather_object(parts, mine)
    together = {number: answer for part in parts for number, answer in part.items()}
    return [together[number] for number in range(len(together))]


def _bar(batches: list[list[int]], wanted: bool):
    if not wanted:
        return batches
    from rich.progress import track

    return track(batches, description="scoring", transient=True)
