"""Every example runs, in a folder of its own, and stays short enough to be read at once."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
REGISTERING = [path for path in EXAMPLES if "register_" in path.read_text(encoding="utf-8")]
MOST_LINES = 60


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path not in REGISTERING], ids=lambda path: path.stem)
def test_example_runs(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    with warnings.catch_warnings(action="ignore"):
        runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example shows something"


@pytest.mark.parametrize("example", REGISTERING, ids=lambda path: path.stem)
def test_example_that_registers_runs(example: Path, tmp_path: Path) -> None:
    """In a process of its own: what it registers is there for the rest of a process."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
