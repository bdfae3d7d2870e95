"""python -m mamba3_train trains."""

from mamba3_train.train import cli

if __name__ == "__main__":
    cli()
