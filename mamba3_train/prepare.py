"""`python -m mamba3_train.prepare`: make, verify or look at a prepared corpus, or plan its best-fit rows."""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from mamba3_train.config import command
from mamba3_train.data.preparation import Preparation
from mamba3_train.data.token_shards import Manifest, read_manifest
from mamba3_train.data.verification import verify
from mamba3_train.errors import UserError

MODES = ("output", "verify", "show", "plan")

SHOW_SETTINGS = ("rows", "sequence_length")


@command("prepare")
def main(config: DictConfig) -> int:
    """Do the one thing that was asked for: `output=DIR`, `verify=DIR`, `show=DIR` or `plan=DIR`; the exit code."""
    try:
        _do(config)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _do(config: DictConfig) -> None:
    asked = [mode for mode in MODES if config[mode] is not None]
    if len(asked) != 1:
        raise UserError(f"give exactly one of {', '.join(f'{mode}=DIR' for mode in MODES)}")
    if config.verify is not None:
        print(f"{config.verify}: every shard is as its manifest says; {summary(verify(config.verify))}")
        return
    if config.show is not None:
        from mamba3_train.data.inspection import show  # needs torch, which preparing does not

        show(config.show, Console(highlight=False), rows=config.rows, sequence_length=config.sequence_length)
        return
    if config.plan is not None:
        if config.sequence_length < 1:
            raise UserError(f"sequence_length={config.sequence_length} must be at least 1")
        manifest = read_manifest(config.plan)
        from mamba3_train.data.best_fit import write_plans  # as above

        write_plans(Path(config.plan), manifest, config.sequence_length)
        print(f"{config.plan}: rows of {config.sequence_length:,} tokens are planned for data.packing=best_fit")
        return
    settings = OmegaConf.to_container(config, resolve=True)
    preparation = Preparation(**{key: value for key, value in settings.items() if key not in (*MODES, *SHOW_SETTINGS)})
    manifest = preparation.run(config.output)
    print(f"{config.output}: {summary(manifest)}")
    if preparation.validation_fraction and not manifest.tokens("validation"):
        print(
            f"no document fell into the validation split (validation_fraction={preparation.validation_fraction}): "
            "training will have nothing to validate on; make another corpus with a larger fraction if it should"
        )


def summary(manifest: Manifest) -> str:
    """Counts of a corpus in one line."""
    documents = sum(shard.documents for shard in manifest.shards())
    tokens = ", ".join(f"{manifest.tokens(split):,} tokens {split}" for split in manifest.splits)
    return f"{documents:,} documents, {tokens}, vocabulary {manifest.vocab_size:,}"


if __name__ == "__main__":
    main()
