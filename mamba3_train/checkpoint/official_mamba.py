"""The public `mamba_ssm` checkpoint layout of Mamba-3, in and out.

Two things differ from ours. Names: a table below. Rotation: the public SISO code rotates neighbouring entries of the
state dimension, its MIMO code entry i with i + N/2; here the halves stand together at the front. A permutation of that
dimension in B and C (rows of in_proj, norms, biases) changes nothing else.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3_train.checkpoint.weights import Weights, check_fits, check_shape, read_safetensors, safetensors_files
from mamba3_train.errors import UserError
from mamba3_train.model import Mamba3Config, Mamba3LM, Mamba3Mixer, MixerConfig

# Public name → ours, for what is not called the same.
_SSM_KEYS = {
    "d_state": "d_state",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "groups",
    "rope_fraction": "rope_fraction",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
    "A_floor": "a_floor",
    "is_outproj_norm": "output_norm",
}
# Settings of the public code that choose an implementation, not a function.
_IGNORED_SSM_KEYS = {"layer", "chunk_size", "fuse_pregate_headwise_norm", "is_mimo", "mimo_rank", "d_model"}
_MODEL_KEYS = {
    "d_model", "n_layer", "d_intermediate", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm",
    "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings",
}  # fmt: skip


def mixer_from_official(config: dict, state_dict: dict[str, Tensor], kernels: str = "reference") -> Mamba3Mixer:
    """Build a mixer from the public constructor arguments and state dict.

    Args:
        config: arguments of the public `Mamba3` module (d_model, d_state, headdim, is_mimo, …); `a_activation`
            (`heavy_tail`, the default, or `softplus`) may be added, because the public code changed it in 2026.
        state_dict: its parameters by public name, any dtype.
        kernels: backend of the scan.

    Raises:
        UserError: an argument or parameter this model has no counterpart for.
    """
    mixer_config = _mixer_config(config)
    with torch.device("meta"):
        mixer = Mamba3Mixer(config["d_model"], mixer_config, kernels=kernels)
    ours = _mixer_to_ours(state_dict, mixer)
    check_fits({name: tensor.shape for name, tensor in ours.items()}, mixer)
    _fill(mixer, ours)
    return mixer


def load_official(folder: str | Path, kernels: str = "reference") -> Mamba3LM:
    """Load a public checkpoint folder: config.json with model.safetensors or pytorch_model.bin.

    Raises:
        UserError: a missing or broken file, or a model this one has no counterpart for.
    """
    config, weights = open_official(folder)
    with torch.device("meta"):
        model = Mamba3LM(config, kernels=kernels)
    _fill(model, weights)
    return model


def open_official(folder: str | Path) -> tuple[Mamba3Config, Weights]:
    """Config and weights of a public checkpoint folder, both as ours; a weight is read when it is asked for.

    Raises:
        UserError: a missing or broken file, or a model this one has no counterpart for.
    """
    folder = Path(folder)
    public = _read_weights(folder)
    config = config_from_official(_read_config(folder), public)
    with torch.device("meta"):
        model = Mamba3LM(config)
    tied = config.tie_embeddings
    flat = public.renamed(lambda name: None if name == "lm_head.weight" and tied else _name_to_ours(name))
    shapes = dict(flat.shapes)
    for i, layer in enumerate(model.layers):
        name = f"layers.{i}.mixer.norm_weight"
        ours = layer.mixer.norm_weight
        if name in shapes and ours is not None and shapes[name].numel() == ours.numel():
            shapes[name] = ours.shape  # flat there
    check_fits(shapes, model)

    def read(name: str) -> Tensor:
        layer, is_mixer, own = name.partition(".mixer.")
        if not is_mixer:
            return flat[name]
        return _tensor_to_ours(own, flat[name], model.get_submodule(f"{layer}.mixer"))

    return config, Weights(shapes, read)


def save_official(model: Mamba3LM, folder: str | Path, mlp_multiple: int = 1) -> None:
    """Write a model as a public checkpoint folder, the two files that the public loader reads.

    Args:
        model: pure Mamba-3, of the paper's mixer.
        folder: made if it is not there.
        mlp_multiple: widen MLPs by zeros, which changes no result, to a multiple of this. The public code builds
            multiples of 128 only; other widths load here alone.

    Raises:
        UserError: the model has layers or settings that the public code does not know.
    """
    folder = Path(folder)
    config = config_to_official(model.config)
    width = -(-model.config.d_mlp // mlp_multiple) * mlp_multiple
    weights = {}
    for name, tensor in model.state_dict().items():
        layer, is_mixer, own = name.partition(".mixer.")
        values = tensor.detach().cpu()
        if is_mixer:
            values = _tensor_to_official(own, values, model.get_submodule(f"{layer}.mixer"))
        elif ".mlp." in name:
            values = _widened(name, values, width)
        weights[_name_to_official(name)] = values.contiguous()
    if model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config | {"d_intermediate": width}, indent=1) + "\n")


def _widened(name: str, weight: Tensor, width: int) -> Tensor:
    """A matrix of an MLP with zeros up to an inner width: rows of each half of fc1, columns of fc2."""
    if name.endswith("fc2.weight"):
        return F.pad(weight, (0, width - weight.shape[1]))
    halves = weight.chunk(2)
    return torch.cat([F.pad(half, (0, 0, 0, width - len(half))) for half in halves])


def config_from_official(config: dict, weights: Weights) -> Mamba3Config:
    """The public config.json as a `Mamba3Config`; the true MLP width is read from the weights."""
    ssm = config.get("ssm_cfg") or {}
    lacking = [key for key in ("d_model", "n_layer", "vocab_size") if not isinstance(config.get(key), int)]
    if lacking:
        raise UserError(f"config.json has no {', '.join(lacking)}: it is not of a public Mamba-3 model")
    if ssm.get("layer") != "Mamba3":
        raise UserError(f"ssm_cfg.layer is {ssm.get('layer')!r}: only Mamba3 checkpoints can be loaded")
    if config.get("attn_layer_idx"):
        raise UserError("attn_layer_idx is not empty: public hybrids with attention layers cannot be loaded")
    if not config.get("rms_norm", True):
        raise UserError("rms_norm is false: only RMSNorm models can be loaded")
    _refuse_unknown(config, _MODEL_KEYS, "config.json")
    fc2 = weights.shapes.get("backbone.layers.0.mlp.fc2.weight")
    return Mamba3Config(
        vocab_size=config["vocab_size"],
        d_model=config["d_model"],
        n_layers=config["n_layer"],
        d_mlp=0 if fc2 is None else fc2[1],
        mixer=_mixer_config(ssm),
        tie_embeddings=config.get("tie_embeddings", True),
        vocab_multiple=config.get("pad_vocab_size_multiple", 8),
    )


def config_to_official(config: Mamba3Config) -> dict:
    """A `Mamba3Config` as the public config.json."""
    mixer = config.mixer
    if "*" in config.layers:
        raise UserError(
            f"layer pattern {config.layer_pattern!r} has attention layers: the public format is saved without"
        )
    if not (mixer.trapezoid and mixer.B_bias and mixer.C_bias and mixer.rotation == "data_dependent"):
        raise UserError("an ablated mixer (trapezoid, rotation or bias off) has no public counterpart")
    ssm = {"layer": "Mamba3"} | {public: getattr(mixer, ours) for public, ours in _SSM_KEYS.items()}
    if mixer.rank > 1:
        ssm |= {"is_mimo": True, "mimo_rank": mixer.rank, "chunk_size": max(64 // mixer.rank, 1)}
    if mixer.a_activation != "heavy_tail":
        ssm["a_activation"] = mixer.a_activation
    return {
        "d_model": config.d_model,
        "d_intermediate": config.d_mlp,
        "n_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def rotary_permutation(mixer: MixerConfig) -> Tensor:
    """Index (N,) with ours[i] = public[index[i]] along the state dimension."""
    d_state, pairs = mixer.d_state, mixer.rotated_pairs
    entries = torch.arange(d_state)
    if mixer.rank == 1:
        rotated = entries[: 2 * pairs]
        return torch.cat([rotated[0::2], rotated[1::2], entries[2 * pairs :]])
    half = d_state // 2
    first, second = entries[:half], entries[half:]
    return torch.cat([first[:pairs], second[:pairs], first[pairs:], second[pairs:]])


def _mixer_config(arguments: dict) -> MixerConfig:
    _refuse_unknown(arguments, _SSM_KEYS.keys() | _IGNORED_SSM_KEYS | {"a_activation"}, "the mixer's arguments")
    rank = arguments.get("mimo_rank", 4) if arguments.get("is_mimo") else 1
    if arguments.get("is_mimo") and rank == 1:
        raise UserError("is_mimo with mimo_rank 1 has no counterpart here: rank 1 is SISO, without MIMO projections")
    fields = {ours: arguments[public] for public, ours in _SSM_KEYS.items() if public in arguments}
    return MixerConfig(rank=rank, a_activation=arguments.get("a_activation", "heavy_tail"), **fields)


def _mixer_to_ours(parameters: Mapping[str, Tensor], mixer: Mamba3Mixer) -> dict[str, Tensor]:
    named = {_mixer_name_to_ours(name): tensor for name, tensor in parameters.items()}
    return {name: _tensor_to_ours(name, tensor, mixer) for name, tensor in named.items()}


def _mixer_to_official(parameters: Mapping[str, Tensor], mixer: Mamba3Mixer) -> dict[str, Tensor]:
    return {
        _mixer_name_to_official(name): _tensor_to_official(name, tensor, mixer) for name, tensor in parameters.items()
    }


def _tensor_to_ours(name: str, tensor: Tensor, mixer: Mamba3Mixer) -> Tensor:
    """A mixer's parameter, by our name, from the public order of the state dimension to ours."""
    if name == "norm_weight":
        return tensor.view(mixer.heads, mixer.config.head_dim)
    return _permute_state(name, tensor, mixer, rotary_permutation(mixer.config))


def _tensor_to_official(name: str, tensor: Tensor, mixer: Mamba3Mixer) -> Tensor:
    """The way back."""
    if name == "norm_weight":
        return tensor.flatten()
    return _permute_state(name, tensor, mixer, rotary_permutation(mixer.config).argsort())


def _permute_state(name: str, tensor: Tensor, mixer: Mamba3Mixer, index: Tensor) -> Tensor:
    """Reorder the state dimension of a mixer's B and C wherever it appears."""
    if name in ("B_norm.weight", "C_norm.weight", "B_bias", "C_bias"):
        return tensor[..., index]
    if name != "in_proj.weight":
        return tensor
    widths = mixer.config.in_proj_widths(mixer.d_model)
    check_shape(name, tensor.shape, mixer.in_proj.weight.shape)
    parts = dict(zip(widths, tensor.split(list(widths.values())), strict=True))
    for part in ("B", "C"):
        parts[part] = parts[part].unflatten(0, (-1, mixer.config.d_state))[:, index].flatten(0, 1)
    return torch.cat(list(parts.values()))


def _fill(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module on meta its parameters, in float32 or wider."""
    tensors = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in weights.items()}
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)


def _name_to_ours(name: str) -> str:
    name = name.removeprefix("backbone.").replace(".norm2.", ".mlp_norm.")
    layer, is_mixer, own = name.partition(".mixer.")
    if is_mixer:
        return layer + is_mixer + _mixer_name_to_ours(own)
    return "norm.weight" if name == "norm_f.weight" else name


def _name_to_official(name: str) -> str:
    layer, is_mixer, own = name.partition(".mixer.")
    if is_mixer:
        return "backbone." + layer + is_mixer + _mixer_name_to_official(own)
    if name == "lm_head.weight":
        return name
    if name == "norm.weight":
        return "backbone.norm_f.weight"
    return "backbone." + name.replace(".mlp_norm.", ".norm2.")


def _mixer_name_to_ours(name: str) -> str:
    return "norm_weight" if name == "norm.weight" else name


def _mixer_name_to_official(name: str) -> str:
    return "norm.weight" if name == "norm_weight" else name


def _refuse_unknown(config: dict, known, where: str) -> None:
    unknown = sorted(config.keys() - known)
    if unknown:
        raise UserError(f"{where} has {', '.join(unknown)}, which this loader does not know: a newer public format?")


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a public checkpoint folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _read_weights(folder: Path) -> Weights:
    files, pickled = safetensors_files(folder), folder / "pytorch_model.bin"
    if files:
        return read_safetensors(files)
    if not pickled.exists():
        raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(pickled))
        return Weights({name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__)
    except Exception as error:  # torch raises many kinds on a damaged file
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise UserError(f"the weights in {folder} cannot be read: {reason}") from None
