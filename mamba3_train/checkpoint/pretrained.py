"""A trained model on the disk, whoever wrote it: one of our runs, an export, or a public checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from mamba3_train.checkpoint import folders
from mamba3_train.checkpoint.official_mamba import open_official
from mamba3_train.checkpoint.weights import Weights, check_fits, read_safetensors, safetensors_files
from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3Config, Mamba3LM
from mamba3_train.model.initialization import keeps_float32

CONFIG = "config.json"
MODEL_TYPE = "mamba3_train"
"""`model_type` of the config.json of an exported folder."""
CONFIG_KEY = "mamba3"
"""Where in that config.json our own fields stand."""


@dataclass(frozen=True)
class Pretrained:
    """What a folder holds: the model's dimensions, its weights by our names, and what may be said of them.

    folder: of the run, the export or the public checkpoint: what lies beside the weights is found there.
    description: one phrase, e.g. `runs/quickstart, step 280`.
    step: of our checkpoint, else None.
    run_config: the resolved config of our run, else None.
    checkpoint: folder of our checkpoint, else None.
    """

    folder: Path
    description: str
    config: Mamba3Config
    weights: Weights
    step: int | None = None
    run_config: DictConfig | None = None
    checkpoint: Path | None = None

    def verify(self) -> None:
        """Raise UserError if our checkpoint is not as it was written; other formats have no hashes."""
        if self.checkpoint is not None:
            _verified(self.checkpoint)

    def build(
        self, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, kernels: str = "auto"
    ) -> Mamba3LM:
        """The model for use, not for training: in evaluation mode, without gradients.

        Args:
            dtype: of the matrices, and so of their products; dynamics and norms are never narrower than float32.
            kernels: backend of the scan.
        """
        with torch.device("meta"):
            model = Mamba3LM(self.config, kernels=kernels)
        wide = torch.promote_types(dtype, torch.float32)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(wide if keeps_float32(name) else dtype)
        model.to_empty(device=device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weights[name])
        return model.eval().requires_grad_(False)


def open_pretrained(folder: str | Path, step: int | None = None, verify: bool = True) -> Pretrained:
    """Find out what a folder holds and check it, without reading the weights of foreign formats.

    A run's newest whole checkpoint, or that of `step`, is compared with its hashes. Nothing is unpickled, and nothing
    that a config names is executed.

    Args:
        folder: of a run, of one of its checkpoints, of an export, or a public `mamba_ssm` checkpoint.
        step: which checkpoint of a run.
        verify: False leaves the hashes for later (`Pretrained.verify`), and takes the newest checkpoint unseen.

    Raises:
        UserError: nothing of the kind is there, or it is broken.
    """
    folder = Path(folder)
    if (folder / folders.MANIFEST).exists() and (folder / folders.STATE).exists():
        _no_step(step, folder)
        return _open_checkpoint(_verified(folder) if verify else folder)
    if (folder / folders.CONFIG).exists():
        return _open_checkpoint(_checkpoint_of(folder, step, verify))
    if not (folder / CONFIG).exists():
        here = "holds neither a config.yaml nor a config.json" if folder.exists() else "does not exist"
        raise UserError(
            f"{folder} {here}: give the folder of a run or of a checkpoint, an exported folder, or a public checkpoint"
        )
    _no_step(step, folder)
    content = _read_json(folder / CONFIG)
    if CONFIG_KEY in content:
        return _open_export(folder, content)
    if "ssm_cfg" in content:
        config, weights = open_official(folder)
        return Pretrained(folder, f"{folder}, a public checkpoint", config, weights)
    raise UserError(
        f"{folder}/{CONFIG} is of model_type {content.get('model_type')!r}: only exports of this package and public "
        "mamba_ssm checkpoints of Mamba-3 can be read"
    )


def _checkpoint_of(run: Path, step: int | None, verify: bool) -> Path:
    checkpoints = run / "checkpoints"
    if step is None:
        newest = folders.newest_whole(checkpoints) if verify else max(folders.published(checkpoints), default=None)
        if newest is None:
            raise UserError(f"the run {run} has no checkpoint yet")
        return newest
    folder = folders.step_folder(checkpoints, step)
    if not folder.exists():
        there = [path.name.removeprefix("step-").lstrip("0") for path in folders.published(checkpoints)]
        raise UserError(f"the run {run} has no checkpoint of step {step}; it has those of {', '.join(there) or 'none'}")
    return _verified(folder) if verify else folder


def _verified(folder: Path) -> Path:
    complaint = folders.complaint(folder)
    if complaint:
        raise UserError(f"the checkpoint {folder} is damaged: {complaint}")
    return folder


def _open_checkpoint(folder: Path) -> Pretrained:
    run_config = _read_yaml(folder / folders.CONFIG)
    if "model" not in run_config:
        raise UserError(f"{folder / folders.CONFIG} has no section model: it is not the config of a run")
    config = Mamba3Config.from_dict(OmegaConf.to_container(run_config.model))
    every = read_safetensors(sorted(folder.glob("*.safetensors")))
    weights = every.renamed(lambda name: name.removeprefix("model.") if name.startswith("model.") else None)
    _check(folder, config, weights)
    step = folders.read_state(folder)["step"]
    home = _run_folder(folder)
    return Pretrained(home, f"{home}, step {step}", config, weights, step, run_config, folder)


def _open_export(folder: Path, content: dict) -> Pretrained:
    config = Mamba3Config.from_dict(content[CONFIG_KEY])
    files = safetensors_files(folder)
    if not files:
        raise UserError(f"{folder} holds no model.safetensors")
    weights = read_safetensors(files).renamed(lambda name: name.removeprefix("model."))
    _check(folder, config, weights)
    return Pretrained(folder, f"{folder}, an export", config, weights)


def _check(folder: Path, config: Mamba3Config, weights: Weights) -> None:
    with torch.device("meta"):
        model = Mamba3LM(config)
    try:
        check_fits(weights.shapes, model)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _run_folder(checkpoint: Path) -> Path:
    """The run a checkpoint lies in, or the checkpoint itself where it has been copied elsewhere."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _no_step(step: int | None, folder: Path) -> None:
    if step is not None:
        raise UserError(f"step={step} chooses among the checkpoints of a run, but {folder} holds one model")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _read_yaml(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} is not the config of a run")
    return content
