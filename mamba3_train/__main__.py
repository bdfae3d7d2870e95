"""python -m mamba3_train trains."""

from mamba3_train.training.stop_signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # imports take their time, and longer where many processes read them from one file system
    from mamba3_train.train import cli

    cli()
