"""Who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import mamba3_train

PACKAGE = Path(mamba3_train.__file__).parent
# Package → packages of ours it may import (besides errors and itself).
ALLOWED = {
    "kernels": set(),
    "model": {"kernels"},
    "data": {"lean_lightning"},
    "checkpoint": {"model"},
    "evaluation": {"model"},
    "sweeping": {"evaluation"},
    "training": {"kernels", "model", "checkpoint", "evaluation"},
}
MAY_IMPORT_LIGHTNING = {"lean_lightning.py"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def sources():
    return [(path.relative_to(PACKAGE).as_posix(), path) for path in sorted(PACKAGE.rglob("*.py"))]


def test_rooms_import_only_what_they_may():
    seen = set()
    for name, path in sources():
        room = name.split("/")[0]
        if room not in ALLOWED:
            continue
        for module in imported(path):
            if module.startswith("mamba3_train."):
                other = module.split(".")[1]
                seen.add((room, other))
                assert other in ALLOWED[room] | {room, "errors"}, f"{name} imports {module}"
    assert ("model", "kernels") in seen, "the walk found nothing"


def test_lightning_is_known_in_few_places():
    for name, path in sources():
        if name in MAY_IMPORT_LIGHTNING or name.startswith("training/"):
            continue
        assert not any(module.split(".")[0] == "lightning" for module in imported(path)), name


def test_importing_is_light():
    heavy = ("torch", "triton", "lightning", "deepspeed", "wandb", "datasets", "matplotlib")
    code = f"import sys, mamba3_train, mamba3_train.train; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_lightning_comes_without_what_torchmetrics_imports_on_the_side():
    """It is installed for the tests, and Lightning's utilities say so when they are asked afterwards."""
    names = ("transformers", "scipy", "matplotlib")
    code = (
        "import sys, mamba3_train.data.datamodule\n"
        f"print('torchmetrics' in sys.modules, {set(names)} & set(sys.modules))\n"
        "from lightning_utilities.core.imports import RequirementCache, package_available\n"
        "from torchmetrics.utilities.imports import _TRANSFORMERS_GREATER_EQUAL_4_4 as theirs\n"
        f"print([package_available(n) and bool(RequirementCache(n)) for n in {names}], bool(theirs))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split("\n")[:2] == ["True set()", "[True, True, True] False"]


def test_the_model_needs_neither_triton_nor_lightning():
    code = (
        "import sys; sys.modules.update(triton=None, lightning=None, deepspeed=None)\n"
        "import mamba3_train.model, mamba3_train.kernels, mamba3_train.checkpoint.official_mamba"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
