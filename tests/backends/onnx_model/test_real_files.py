"""``simplify`` on real ONNX files: the same numbers, fewer nodes; skipped where the shared corpus is not there."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch

import regauge
from regauge.backends.onnx_model.write import all_graphs
from regauge.backends.run_onnxruntime import Session

CORPUS = Path(__file__).parents[4] / "shared" / "corpus" / "onnx"
NODES = {  # of all scopes, without Constants: before, and at most after
    "face_version-RFB-320": (211, 100),
    "face_version-RFB-320_simplified": (110, 107),
    "magika_standard_v1": (88, 62),
    "magika_standard_v2_1": (72, 56),
    "silero_v3": (430, 246),
    "silero_v6": (348, 94),
    "silero_v6_16k_op15": (190, 46),
}


def nodes(path: Path) -> int:
    return sum(node.op_type != "Constant" for graph in all_graphs(onnx_ir.load(path)) for node in graph)


def inputs(name: str) -> Iterator[list[torch.Tensor]]:
    """Audio in frames with their context and a state, bytes, or an image; at two batch sizes where there is one."""
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(draw.standard_normal(shape).astype(np.float32) * 0.1)

    if name.startswith("face"):
        yield [normal(1, 3, 240, 320)]
    elif name == "silero_v3":
        yield from ([normal(1, length), normal(2, 1, 64), normal(2, 1, 64)] for length in (512, 4000))
    for batch in (1, 3):
        if name.startswith("silero_v6"):
            yield [normal(batch, 576), normal(2, batch, 128), torch.tensor(16000)]
            if name == "silero_v6":
                yield [normal(batch, 288), normal(2, batch, 128), torch.tensor(8000)]
        elif name.startswith("magika"):
            text = torch.from_numpy(draw.integers(0, 256, (batch, 4096 if "v2" in name else 1536)))
            yield [text.int() if "v2" in name else text.float()]


@pytest.mark.parametrize("name", NODES)
def test_real_file(name: str, tmp_path: Path) -> None:
    source, target = CORPUS / f"{name}.onnx", tmp_path / "small.onnx"
    if not source.exists():
        pytest.skip(f"{source.name} is not here: it belongs to the shared corpus, not to the repository")
    regauge.optimize(regauge.load(source), "simplify").to_onnx(target)
    assert nodes(source) == NODES[name][0] and nodes(target) <= NODES[name][1]
    assert target.stat().st_size < source.stat().st_size + 500  # notes on what was done
    for optimisation in ("off", "all"):
        before, after = (Session(path, optimisation=optimisation) for path in (source, target))
        assert before.input_shapes == after.input_shapes and before.input_types == after.input_types
        for given in inputs(name):
            for a, b in zip(before.run(given), after.run(given), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
