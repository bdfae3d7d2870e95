"""In which dtype every parameter rests, travels, is summed and is optimised, and whether it is decayed."""

import re

import torch
from torch.distributed.fsdp import FSDPModule

from mamba3_train.training.strategies import tensors_to_save
from mamba3_train.training.zero import ZeRO


def audit(strategy, model: torch.nn.Module, optimizer) -> dict[str, str]:
    """Name without layer numbers → 'storage / travel / sum of gradients / optimizer state / decay'.

    Raises:
        ValueError: two layers' parameters of one name differ.
    """
    state = tensors_to_save(strategy, model, optimizer)
    decay, travel = _decay(strategy, model, optimizer), _travel(strategy, model)
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        moments = {state[f"optimizer.{name}.{key}"].dtype for key in ("exp_avg", "exp_avg_sq")}
        row = [parameter.dtype, *travel.get(name, (None, torch.float32)), *moments, decay[name]]
        text = " / ".join(str(value).removeprefix("torch.") for value in row)
        if found.setdefault(_role(name), text) != text:
            raise ValueError(f"{name} is {text}, other layers' is {found[_role(name)]}")
    return found


def _role(name: str) -> str:
    return re.sub(r"layers\.\d+", "layers", name)


def _travel(strategy, model) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """In which dtype parameters are gathered and gradients summed, for strategies that may choose."""
    if isinstance(strategy, ZeRO):
        dtypes = {n: getattr(p, "comm_dtype", p.dtype) for n, p in model.named_parameters()}
        return {name: (dtype if strategy.stage == 3 else torch.float32, dtype) for name, dtype in dtypes.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for parameter in group.fsdp_params if group else ():
            kept = parameter.orig_dtype
            dtypes = (parameter.param_dtype or kept, parameter.reduce_dtype or kept)
            found[names[id(parameter.sharded_param)]] = dtypes
    return found


def _decay(strategy, model, optimizer) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if not isinstance(strategy, ZeRO):
        return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    # DeepSpeed's groups hold flat pieces; these are the parameters behind them.
    if strategy.stage == 3:
        groups = [
            (optimizer.sub_group_to_group_id[number], parameters)
            for number, parameters in enumerate(optimizer.fp16_groups)
        ]
    else:
        groups = enumerate(optimizer.bit16_groups)
    return {names[id(p)]: optimizer.param_groups[i]["weight_decay"] for i, ps in groups for p in ps}
