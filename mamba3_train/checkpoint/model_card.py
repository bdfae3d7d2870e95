"""The README.md of an exported model: what it is, how to load it, what is known of its training."""

import json
from pathlib import Path

from mamba3_train.checkpoint.pretrained import Pretrained

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mamba3
- mamba3_train
---

# {title}

A Mamba-3 language model (arXiv 2603.15569) of {parameters:,} parameters, trained by mamba3_train.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

The code that is loaded, `modeling_mamba3.py` and `mamba3_scan.py`, needs torch and transformers only, on any device.

| | |
|---|---|
{rows}
"""


def model_card(pretrained: Pretrained, dtype: str) -> str:
    """The card of a model whose matrices are stored in a dtype."""
    config = pretrained.config
    mixer, attention = config.mixer, config.attention
    rows = {
        "layers": f"{config.n_layers}, `{config.layer_pattern}` repeated (M: Mamba-3, *: attention)",
        "width": f"{config.d_model}, MLP {config.d_mlp}",
        "vocabulary": f"{config.vocab_size:,}",
        "weights": f"matrices {dtype}, dynamics and norms {'float64' if dtype == 'float64' else 'float32'}",
    }
    if "M" in config.layers:
        kind = "SISO" if mixer.rank == 1 else f"MIMO, rank {mixer.rank}"
        rows["mixer"] = f"{kind}, state {mixer.d_state}, {mixer.heads(config.d_model)} heads of {mixer.head_dim}"
    if "*" in config.layers:
        rows["attention"] = (
            f"{attention.n_heads} heads of {attention.head_dim}, {attention.n_kv_heads} of keys and values"
        )
    rows |= _training(pretrained)
    size = sum(shape.numel() for shape in pretrained.weights.shapes.values())
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return _CARD.format(title=Path(pretrained.folder).resolve().name, parameters=size, rows=table)


def _training(pretrained: Pretrained) -> dict[str, str]:
    """What the run's config and its summary say, if the model comes from a run."""
    run, found = pretrained.run_config, {}
    if run is None:
        return found
    found["steps"] = f"{pretrained.step:,}"
    data = run.get("data") or {}
    if data.get("global_batch_size") and data.get("sequence_length"):
        tokens = pretrained.step * data.global_batch_size * data.sequence_length
        found["tokens"] = f"{tokens:,}, in rows of {data.sequence_length:,}"
    try:
        summary = json.loads((pretrained.folder / "summary.json").read_text())
        if summary.get("step") == pretrained.step and "val/loss" in summary:
            found["validation loss"] = f"{summary['val/loss']:.4f} nats a token"
    except (OSError, ValueError, AttributeError):
        pass  # the run is not over, or was copied without it
    return found
