"""`python -m mamba3_train.compare +recipe=NAME`: variants of a recipe, trained one after the other and compared."""

import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig

from mamba3_train.config import command
from mamba3_train.errors import UserError


@command("compare")
def main(config: DictConfig) -> int:
    """Train every variant with every seed, then write comparison.json and comparison.png; returns the exit code."""
    from rich.console import Console

    console, folder = Console(highlight=False), Path(config.run.dir)
    runs = planned_runs(config)
    for number, run in enumerate(runs, start=1):
        console.print(f"[bold]{run['variant']}, seed {run['seed']}[/bold] ({number} of {len(runs)})")
        code = train(run["arguments"])
        if code:
            console.print(f"{run['folder']} ended with code {code}; the same command again goes on from there")
            return code

    from mamba3_train.evaluation import comparison

    results = comparison.read(runs, config.comparison.score)
    console.print(comparison.table(results))
    longest = config.data.longest[1] if "longest" in config.data else None
    comparison.plot(results, folder / "comparison.png", title=config.run.name, trained_to=longest)
    comparison.write(results, folder / "comparison.json")
    console.print(f"picture {folder / 'comparison.png'}\nnumbers {folder / 'comparison.json'}", soft_wrap=True)
    return 0


def planned_runs(config: DictConfig) -> list[dict]:
    """Every run as its variant, seed, folder and the arguments of its command; all of them are composed once.

    Raises:
        UserError: nothing to compare; and what composing a mistaken override raises.
    """
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    comparison, hydra = config.comparison, HydraConfig.get()
    if not comparison.variants or not comparison.seeds:
        raise UserError("comparison.variants and comparison.seeds must name at least one each; +recipe=parity has some")
    places = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    runs = []
    for seed in comparison.seeds:
        for variant, changes in comparison.variants.items():
            folder = f"{config.run.dir}/{variant}-seed{seed}"
            own = [f"run.name={config.run.name}-{variant}-seed{seed}", f"run.dir={folder}", f"run.seed={seed}"]
            overrides = [*hydra.overrides.task, *changes, *own]
            # Now, because a mistake in the last variant should not wait for its turn.
            OmegaConf.resolve(compose("train", overrides))
            arguments = [*places, *overrides]
            runs.append({"variant": variant, "seed": seed, "folder": folder, "arguments": arguments})
    return runs


def train(arguments: list[str]) -> int:
    """Train in a process of its own; returns its exit code."""
    return subprocess.run([sys.executable, "-m", "mamba3_train", *arguments], check=False).returncode


if __name__ == "__main__":
    main()
