"""The picture of accuracies shows what was measured, and every variant."""

from matplotlib.figure import Figure

from mamba3_train.evaluation.accuracy_by_length import plot_accuracy


def test_lengths_are_told_and_equal_curves_are_seen(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    equal = {20: 1.0, 40: 0.5, 255: 0.25}
    plot_accuracy({"first": [equal], "second": [equal]}, tmp_path / "accuracy.png", "a task", 160)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["20", "40", "255"]
    assert axes.yaxis.get_major_formatter()(0.25) == "25%"
    first, second, trained_to = axes.lines
    assert list(first.get_xdata()) == list(second.get_xdata()) == [20, 40, 255]
    assert list(first.get_ydata()) == list(second.get_ydata()) == [1.0, 0.5, 0.25]
    assert list(trained_to.get_xdata()) == [160, 160]
    assert first.get_markersize() > second.get_markersize()  # the second, drawn over it, leaves it a rim
