"""What holds for every test process: one thread, Triton interpreted where there is no GPU, the same random numbers."""

import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# So that tests neither fight for cores nor depend on how many there are.
torch.set_num_threads(1)

# Read when Triton is first imported, by whichever test that is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# Files that take a minute or more, the longest first: begun last, one would be waited for by itself.
LONGEST = (
    "test_gpu_training.py",  # with a GPU
    "test_train.py", "test_strategies.py", "test_preemption.py", "test_triton_scan.py", "test_slurm.py",
    "test_guards.py", "test_triton_compile.py", "test_sweep.py", "test_compare.py", "test_workers.py",
    "test_task_evaluation.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files come first; tests marked `gpu`, `multi_gpu` wait for a machine that has one, or two."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        for mark, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(mark) and torch.cuda.device_count() < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_our_own(tmp_path_factory):
    """Tests leave the user's cache alone."""
    os.environ["MAMBA3_TRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def quickstart_corpus(tmp_path_factory):
    """A small corpus of Python sources with the quickstart's tokenizer size, prepared once a process."""
    from hydra.utils import instantiate

    from mamba3_train.config import compose

    folder = tmp_path_factory.mktemp("corpus") / "python"
    config = compose("+recipe=quickstart", f"data.path={folder}", "data.prepare.source.max_bytes=1000000")
    instantiate(config.data).prepare_data()
    return folder


@pytest.fixture
def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
