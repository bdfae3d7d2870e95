"""The loss curve is a picture."""

from mamba3_train.evaluation.loss_curve import plot_loss


def test_loss_curve_is_a_png(tmp_path):
    rows = [{"step": s, "tokens": 10 * s, "train/loss": 5 / s} for s in range(1, 20)]
    plot_loss([*rows, {"step": 19, "tokens": 190, "val/loss": 0.3}], tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
