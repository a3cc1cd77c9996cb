"""The benchmark of kernels, on tiny shapes in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_cases import CASES, Case, inputs, small

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_case_runs_and_errs_no_more_than_twice_as_much_as_torch(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--output", str(table)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("|").split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(CASES)
    heads = [head.strip() for head in rows[0]]
    for row in rows[1:]:
        cells = dict(zip(heads, row, strict=True))
        own, eager = (float(cells[name].rpartition(", ")[2]) for name in ("regauge", "eager"))
        assert own <= max(2 * eager, torch.finfo(torch.bfloat16).eps), row
        assert float(cells["floor, us"]) > 0 and int(cells["kernels"]) >= 1


def test_sizes_shrink_in_the_interpreter_and_types_are_kept() -> None:
    assert [small(extent) for extent in (1, 3, 16, 4096, 11008)] == [1, 3, 5, 16, 43]
    case = Case("codes", torch.add, ((2, 3), (2, 3)), types={1: torch.int8})
    x, codes = inputs(case, case.shapes, torch.float16, torch.device("cpu"))
    assert (x.dtype, codes.dtype) == (torch.float16, torch.int8) and codes.abs().max() <= 7


def test_without_a_gpu_it_says_what_it_can_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "there is no GPU: --small runs the kernels" in done.stderr
