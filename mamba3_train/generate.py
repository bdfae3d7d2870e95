"""`python -m mamba3_train.generate run=DIR prompt="…"`: text from a trained model."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mamba3_train.config import command
from mamba3_train.errors import UserError

OPENING = ("step", "device", "dtype", "tokenizer")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@command("generate", texts=("prompt",))
def main(config: DictConfig) -> int:
    """Continue the prompts: text to the standard output, everything else beside it."""
    prompts = read_prompts(config.prompt, config.prompts)
    for key in ("samples", "batch_size", "max_new_tokens"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]} must be at least 1")
    if config.state_dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"state_dtype={config.state_dtype} must be auto, float32 or bfloat16")

    from rich.console import Console

    from mamba3_train.evaluation.sampling import Sampling
    from mamba3_train.trained_model import DTYPES, open_trained_model

    settings = {
        "sampling": Sampling(**{key: config[key] for key in SAMPLING}),
        "stop": stop_strings(config.stop),
        "cuda_graph": config.cuda_graph,
        "ssm_dtype": None if config.state_dtype == "auto" else DTYPES[config.state_dtype],
    }
    trained = open_trained_model(config.run, kernels=config.kernels.backend, **{key: config[key] for key in OPENING})
    console = Console(stderr=True, highlight=False)
    size = sum(parameter.numel() for parameter in trained.model.parameters())
    console.print(f"{trained.description}: {size:,} parameters on {trained.device}", soft_wrap=True)
    rows = [prompt for prompt in prompts for _ in range(config.samples)]
    try:
        done = list(generations(config, trained, rows, settings))
    except KeyboardInterrupt:
        write("\n")
        return 130
    console.print(speed(done), soft_wrap=True)
    return 0


def generations(config: DictConfig, trained, rows: list[str], settings: dict) -> Iterator:
    """Continue prompts batch by batch, show them and keep them; one alone is shown as it comes."""
    from mamba3_train.evaluation.generation import generate

    alone = len(rows) == 1
    for begin in range(0, len(rows), config.batch_size):
        batch = rows[begin : begin + config.batch_size]
        if alone:
            write(batch[0])
        generation = generate(
            trained.model,
            trained.tokenizer,
            batch,
            config.max_new_tokens,
            seed=config.seed + begin,
            on_text=(lambda _, text: write(text)) if alone else (lambda *_: None),
            **settings,
        )
        for prompt, continuation in zip(batch, generation.continuations, strict=True):
            write("\n" if alone else f"{prompt}{continuation.text}\n{'─' * 40}\n")
        if config.output is not None:
            save(Path(config.output), batch, generation.continuations, first=begin == 0)
        yield generation


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """The prompt itself, or those of a file: a line each; of a .jsonl file a JSON text, or an object with `prompt`.

    Raises:
        UserError: both or neither are given, or the file cannot be read or holds no prompt.
    """
    if (prompt is None) == (file is None):
        raise UserError("give either prompt=TEXT or prompts=FILE")
    if prompt is not None:
        return [prompt]
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={file} cannot be read: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"prompts={file} holds no prompt")
    return [_from_json(file, line) for line in lines] if file.endswith(".jsonl") else lines


def _from_json(file: str, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise UserError(f'prompts={file}: {line[:60]} is neither a JSON text nor an object with "prompt"')
    return value


def stop_strings(given) -> list[str]:
    """One text or several, with `\\n` for a new line."""
    if given is None:
        return []
    listed = OmegaConf.to_container(given) if OmegaConf.is_config(given) else [given]
    return [str(text).replace("\\n", "\n") for text in listed]


def write(text: str) -> None:
    """Text to the standard output, at once."""
    print(text, end="", flush=True)


def save(path: Path, prompts: list[str], continuations, first: bool) -> None:
    """Add results to a file, a JSON object a line; the first ones replace what was there."""
    rows = (
        json.dumps({"prompt": prompt, "text": c.text, "reason": c.reason, "tokens": c.tokens}, ensure_ascii=False)
        for prompt, c in zip(prompts, continuations, strict=True)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if first else "a") as file:
            file.writelines(f"{row}\n" for row in rows)
    except OSError as error:
        raise UserError(f"output={path} cannot be written: {error}") from error


def speed(done: list) -> str:
    """Tokens a second of all batches together."""
    prompt, drawn = (sum(getattr(g, key) for g in done) for key in ("prompt_tokens", "tokens"))
    reading, drawing = (sum(getattr(g, key) for g in done) for key in ("prefill_seconds", "decode_seconds"))
    return (
        f"{drawn:,} tokens in {drawing:.2f} s: {drawn / drawing:,.1f} tokens/s; "
        f"{prompt:,} of prompts read in {reading:.2f} s"
    )


if __name__ == "__main__":
    main()
