"""`python -m mamba3_train.export run=DIR to=hf output=DIR`: a trained model for other programs."""

from pathlib import Path

from omegaconf import DictConfig

from mamba3_train.config import command
from mamba3_train.errors import UserError

TARGETS = ("hf", "mamba_ssm", "safetensors")
DTYPES = ("float32", "bfloat16")


@command("export")
def main(config: DictConfig) -> None:
    """Write the folder and say where it is."""
    for key, choices in (("to", TARGETS), ("dtype", DTYPES)):
        if config[key] not in choices:
            raise UserError(f"{key}={config[key]} must be one of {', '.join(choices)}")
    if config.to == "mamba_ssm" and config.dtype != "float32":
        raise UserError(f"to=mamba_ssm is written in float32, not dtype={config.dtype}")
    if config.shard_gib <= 0:
        raise UserError(f"shard_gib={config.shard_gib} must be more than 0")

    import torch

    from mamba3_train.checkpoint import exports
    from mamba3_train.checkpoint.pretrained import open_pretrained
    from mamba3_train.trained_model import find_tokenizer

    output = Path(config.output)
    exports.refuse_used(output)
    pretrained = open_pretrained(config.run, config.step)
    tokenizer = find_tokenizer(pretrained, config.tokenizer)
    documents = {} if tokenizer is None else tokenizer.documents()
    end = None if tokenizer is None else tokenizer.end_of_document_id
    dtype, shard_bytes = getattr(torch, config.dtype), int(config.shard_gib * 2**30)
    with exports.new_folder(output) as folder:
        if config.to == "hf":
            exports.export_hugging_face(pretrained, folder, documents, end, dtype, shard_bytes)
        elif config.to == "mamba_ssm":
            exports.export_official(pretrained, folder, documents)
        else:
            exports.export_safetensors(pretrained, folder, documents, dtype, shard_bytes)
    without = "" if documents else ", without a tokenizer: none is known (name one by tokenizer=PATH)"
    print(f"{output}: {pretrained.description} as {config.to}{without}")


if __name__ == "__main__":
    main()
