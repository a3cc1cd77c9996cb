"""``simplify`` on its own result changes nothing, over every ONNX file that is here: ``pytest -m sweep``.

Exports of networks are here once a benchmark has made them (``python -m benchmarks.simplify``), real files where the
shared corpus lies beside the repository; the light ones come with onnx.
"""

from pathlib import Path

import onnx_ir
import pytest
from benchmarks.onnx_exports import FOLDER, light_files, real_files

import regauge
from onnx_oracle import quietly_loaded
from regauge.backends.onnx_model.write import all_graphs

FILES = [*sorted(FOLDER.glob("*.onnx")), *real_files(), *light_files()]


def nodes(path: Path) -> int:
    return sum(node.op_type != "Constant" for graph in all_graphs(onnx_ir.load(path)) for node in graph)


@pytest.mark.sweep
@pytest.mark.skipif(not FILES, reason="no ONNX files are here: python -m benchmarks.simplify makes exports")
@pytest.mark.parametrize("source", FILES, ids=lambda path: path.stem)
def test_a_second_run_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    regauge.optimize(quietly_loaded(source), "simplify").to_onnx(once)
    regauge.optimize(quietly_loaded(once), "simplify").to_onnx(twice, verify=False)
    assert nodes(once) <= nodes(source)
    assert twice.read_bytes() == once.read_bytes()
