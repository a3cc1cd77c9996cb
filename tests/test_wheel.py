"""The wheel that is built from the source distribution holds every module, reached through the links or not."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("ir", "passes", "frontends", "backends")

BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def copy_sources(target: Path) -> Path:
    """What a build reads, copied with its links as links: a build leaves files behind, so it runs elsewhere."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", *LINKED):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in the wheel."""
    if importlib.util.find_spec("setuptools.build_meta") is None:
        pytest.skip("setuptools, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_sources(folder / "sources")
    sdist = run(sys.executable, "-c", BUILD_SDIST, str(folder), cwd=sources).splitlines()[-1]
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / sdist))
    run(sys.executable, *build, cwd=folder)
    (built,) = folder.glob("regauge-*.whl")
    return set(zipfile.ZipFile(built).namelist())


def modules() -> set[str]:
    in_package = {f"regauge/{file.name}" for file in (ROOT / "src" / "regauge").glob("*.py")}
    in_folders = {file.relative_to(ROOT) for folder in LINKED for file in (ROOT / folder).rglob("*.py")}
    return in_package | {f"regauge/{file.as_posix()}" for file in in_folders}


def test_wheel_holds_every_module(wheel: set[str]) -> None:
    assert {name for name in wheel if name.endswith(".py")} == modules()


def test_wheel_is_typed(wheel: set[str]) -> None:
    assert "regauge/py.typed" in wheel


def test_wheel_holds_what_modules_read(wheel: set[str]) -> None:
    assert {"regauge/backends/triton_kernels/configs.json", "regauge/backends/native/ort_kernels.cc"} <= wheel


def test_wheel_leaves_no_folder_beside_the_package(wheel: set[str]) -> None:
    """`import ir` must fail where regauge is installed."""
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"regauge"}
