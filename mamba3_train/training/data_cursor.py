"""Where in the data a run is at each of its steps."""

from dataclasses import dataclass


@dataclass
class DataCursor:
    """Samples consumed = step · samples_per_step + passed_over.

    The second term is 0 until the run is rolled back: then the step count returns to an earlier step while the data
    goes on. A checkpoint holds `samples` and `rollbacks`, from which a resume on any number of processes has all three.

    Args:
        samples_per_step: rows of the global batch.
        passed_over: samples read in steps that were rolled back.
        rollbacks: how often that happened.
    """

    samples_per_step: int
    passed_over: int = 0
    rollbacks: int = 0

    def samples(self, step: int) -> int:
        """Samples consumed by all ranks when so many steps are done; the next step begins with this one."""
        return step * self.samples_per_step + self.passed_over

    def roll_back(self, from_step: int, to_step: int) -> None:
        """The next step follows `to_step` and reads what would have followed `from_step`."""
        self.passed_over += (from_step - to_step) * self.samples_per_step
        self.rollbacks += 1

    def state(self, step: int) -> dict[str, int]:
        """What a checkpoint of a step keeps."""
        return {"samples": self.samples(step), "rollbacks": self.rollbacks}

    def restore(self, state: dict) -> None:
        """Take over the state of a checkpoint."""
        self.passed_over = state["samples"] - state["step"] * self.samples_per_step
        self.rollbacks = state.get("rollbacks", 0)
