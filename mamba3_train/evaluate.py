"""`python -m mamba3_train.evaluate run=DIR tasks=[…]`: perplexity, bits per byte, tasks of lm-evaluation-harness."""

import json
import os
import re
from pathlib import Path

from omegaconf import DictConfig

from mamba3_train.config import command
from mamba3_train.errors import UserError
from mamba3_train.training import process_end

OPENING = ("step", "dtype", "tokenizer")
PERPLEXITY, PAPER = "perplexity", "paper"
DEFAULT_LENGTH = 2048


@command("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate, print tables, write JSON."""
    check(config)
    from rich.console import Console

    from mamba3_train.evaluation.paper_results import TASKS
    from mamba3_train.evaluation.results_table import paper_table, perplexity_table, task_table
    from mamba3_train.trained_model import choose_device, open_trained_model
    from mamba3_train.training import processes
    from mamba3_train.training.stop_signals import StopSignals

    if not processes.started_by_launcher():
        with StopSignals() as stop:
            processes.start_processes(config.devices, 1, stop, module="mamba3_train.evaluate")
    device = choose_device(config.device)
    processes.join(device.type == "cuda")
    if device.type == "cuda" and processes.started_by_launcher():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    wanted = [name for task in config.tasks for name in (TASKS if task == PAPER else [task]) if name != PERPLEXITY]
    trained = open_trained_model(
        config.run, device=str(device), kernels=config.kernels.backend, **{key: config[key] for key in OPENING}
    )
    console = Console(highlight=False, quiet=processes.rank() != 0)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    console.print(f"{trained.description}: {parameters:,} parameters on {trained.device}", soft_wrap=True)
    results = {"model": trained.description, "step": trained.step, "parameters": parameters, "dtype": config.dtype}
    if PERPLEXITY in config.tasks:
        results[PERPLEXITY] = perplexity_of_sources(config, trained)
        results["measured_on"] = {"corpus": str(corpus_of(config, trained)), "split": config.split}
        results["measured_on"] |= {"rows": config.rows, "sequence_length": row_length(config, trained)}
        console.print(perplexity_table(results[PERPLEXITY]))
    if wanted:
        results["tasks"] = harness_results(config, trained, wanted)
        results["limit"], results["num_fewshot"] = config.limit, config.num_fewshot
        console.print(task_table(results["tasks"]))
        if results["tasks"].keys() >= TASKS.keys():
            console.print(paper_table(results["tasks"], trained.description, parameters))
    if processes.rank() == 0:
        write(results, config, trained.step, console)


def check(config: DictConfig) -> None:
    """Raise UserError for numbers and tasks that mean nothing."""
    if not config.tasks:
        raise UserError(f"tasks=[] asks for nothing: give {PERPLEXITY}, {PAPER} or tasks of lm-evaluation-harness")
    for key in ("devices", "rows", "sequence_length", "tokens_per_batch", "limit"):
        if config[key] is not None and config[key] < 1:
            raise UserError(f"{key}={config[key]} must be at least 1")


def row_length(config: DictConfig, trained) -> int:
    """The length asked for, or that of training."""
    if config.sequence_length is not None:
        return config.sequence_length
    data = {} if trained.run_config is None else trained.run_config.data
    return data.get("sequence_length", DEFAULT_LENGTH)


def corpus_of(config: DictConfig, trained) -> str:
    """The corpus asked for, or that of training.

    Raises:
        UserError: there is neither.
    """
    corpus = config.corpus
    if corpus is None and trained.run_config is not None:
        corpus = trained.run_config.data.get("path")
    if corpus is None:
        raise UserError(f"{config.run} names no corpus: give a prepared one by corpus=DIR")
    return corpus


def perplexity_of_sources(config: DictConfig, trained) -> dict[str, dict]:
    """Loss, perplexity and bits per byte of every source of a corpus, and of all together where there are several.

    Raises:
        UserError: no corpus, one of another tokenizer, or one without such a split.
    """
    import torch

    from mamba3_train.data.token_bytes import token_bytes
    from mamba3_train.data.token_shards import read_manifest
    from mamba3_train.evaluation.perplexity import Likelihood, likelihood

    corpus = corpus_of(config, trained)
    manifest = read_manifest(corpus)
    if manifest.tokenizer_fingerprint != trained.tokenizer.fingerprint:
        raise UserError(
            f"the corpus {corpus} was prepared with another tokenizer than the model of {config.run} has: prepare it "
            "with the model's tokenizer.json (tokenizer.file=…), or give tokenizer=PATH"
        )
    if not manifest.tokens(config.split):
        raise UserError(f"{corpus} has no tokens in split={config.split}: its splits are {', '.join(manifest.splits)}")
    sizes = token_bytes(trained.tokenizer)
    sizes = None if sizes is None else torch.from_numpy(sizes)
    found = {}
    for source in manifest.sources():
        batches = row_batches(corpus, manifest, config.split, source, row_length(config, trained), config)
        if batches is not None:
            found[source] = likelihood(trained.model, batches, sizes, trained.device)
    if len(found) > 1:
        parts = found.values()
        size = None if sizes is None else sum(part.bytes for part in parts)
        found["all"] = Likelihood(sum(part.nats for part in parts), sum(part.targets for part in parts), size)
    return {name: figures(part) for name, part in found.items()}


def figures(part) -> dict:
    """A likelihood as numbers for JSON."""
    return {
        "tokens": part.targets,
        "bytes": part.bytes,
        "loss": part.nats / part.targets,
        "perplexity": part.perplexity,
        "bits_per_byte": part.bits_per_byte,
    }


def row_batches(corpus, manifest, split: str, source: str, length: int, config: DictConfig):
    """This rank's batches of a source's rows, cut as in training; None where it has no two tokens."""
    from mamba3_train.data.batches import ValidationBatches
    from mamba3_train.data.packing import CutRows, unpack
    from mamba3_train.data.token_shards import TokenSplit
    from mamba3_train.training import processes

    documents = TokenSplit(corpus, manifest, split, source)
    if documents.tokens < 2:
        return None
    rows = CutRows(documents, min(length, documents.tokens - 1))
    count = min(rows.count, config.rows or rows.count)
    together = max(1, config.tokens_per_batch // rows.sequence_length)
    batches = ValidationBatches(rows, count, together, processes.rank(), processes.world_size())
    return (unpack(batches[number]) for number in range(len(batches)))


def harness_results(config: DictConfig, trained, tasks: list[str]) -> dict:
    """What lm-evaluation-harness finds."""
    from mamba3_train.evaluation.generation import generate
    from mamba3_train.evaluation.lm_harness import HarnessModel, evaluate_tasks, load_tasks
    from mamba3_train.evaluation.sampling import Sampling
    from mamba3_train.training import processes

    def continuations(prompts: list[str], most: int, stop: list[str], temperature: float) -> list[str]:
        texts, together = [], max(1, config.tokens_per_batch // length)
        for begin in range(0, len(prompts), together):
            batch, sampling = prompts[begin : begin + together], Sampling(temperature=temperature)
            done = generate(trained.model, trained.tokenizer, batch, most, sampling=sampling, stop=stop, seed=begin)
            texts += [continuation.text for continuation in done.continuations]
        return texts

    length = row_length(config, trained)
    model = HarnessModel(
        trained.model,
        trained.tokenizer,
        trained.device,
        max_length=length,
        tokens_per_batch=config.tokens_per_batch,
        generate=continuations,
        show_progress=processes.rank() == 0,
    )
    loaded = load_tasks(tasks, include_path=config.include_path, num_fewshot=config.num_fewshot)
    return evaluate_tasks(model, loaded, limit=config.limit)


def otherwise(config: DictConfig) -> list[str]:
    """What was asked for otherwise than by default, for the name of the file: other figures do not take its place."""
    found = [] if list(config.tasks) == [PERPLEXITY] else list(config.tasks)
    found += [] if config.split == "validation" else [config.split]
    found += [] if config.corpus is None else [Path(config.corpus).name]
    found += [f"{config[key]}-{key}" for key in ("rows", "sequence_length", "limit", "num_fewshot") if config[key]]
    return [re.sub(r"[^\w.-]+", "-", part) for part in found]


def write(results: dict, config: DictConfig, step: int | None, console) -> None:
    """Write the results as JSON, if there is a place for them."""
    folder = Path(config.run)
    path = None if config.output is None else Path(config.output)
    if path is None and (folder / "checkpoints").is_dir():
        path = folder / f"evaluation-step-{step:08d}{'-'.join(['', *otherwise(config)])}.json"
    if path is None:
        console.print("output=FILE writes these results as JSON")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"output={path} cannot be written: {error}") from error
    console.print(f"results {path}", soft_wrap=True)


if __name__ == "__main__":
    with process_end.at_once():
        main()
