"""python -m mamba3_train trains."""

from mamba3_train.training import process_end
from mamba3_train.training.stop_signals import hold_signals

if __name__ == "__main__":
    with process_end.at_once():
        hold_signals()  # imports take their time, and longer where many processes read them from one file system
        from mamba3_train.train import cli

        cli()
