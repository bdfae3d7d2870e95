"""The wheel: carries its yaml, and runs from anywhere in an environment of its own."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


def test_wheel_holds_package_and_yaml_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for kind in ("conf", "recipes"):
        shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / kind).rglob("*.yaml")}
        assert {f"mamba3_train/{name}" for name in shipped} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mamba3_train"}


def test_installed_wheel_composes_the_quickstart_from_the_root_folder(wheel, tmp_path):
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path)}))
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=120)
    # The dependencies come from here; a .pth file adds their folder but not this checkout's editable install.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = subprocess.run(
        [python, "-c", "import mamba3_train; print(mamba3_train.__file__)"],
        cwd="/", capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    job = subprocess.run(
        [python, "-m", "mamba3_train", "+recipe=quickstart", "--cfg", "job"],
        cwd="/", capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "rank: 2" in job.stdout
    assert "name: quickstart" in job.stdout


def test_no_python_among_the_yaml():
    """A .py file in conf/ or recipes/ makes editable installs fail."""
    found = [path for kind in ("conf", "recipes") for path in (ROOT / kind).rglob("*") if path.is_file()]
    assert found
    assert {path.suffix for path in found} == {".yaml"}
