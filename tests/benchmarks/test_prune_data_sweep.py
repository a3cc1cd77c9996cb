"""``prune`` with data on ten families of networks: refitted they are nearer to the original than without.

Slow: run them with ``pytest -m sweep``. They need what ``test_coverage_sweep`` needs. Weights are random.
"""

import sys
from typing import Any

import pytest
import torch
from benchmarks.model_case import SHARED, redraw
from benchmarks.zoo import build

import regauge
from regauge.frontends.capture import capture
from regauge.ir.graph import Graph

LIST = SHARED / "tools" / "coverage_models.py"
NAMES = [
    "timm:resnet18:64", "timm:mobilenetv3_small_100:64", "timm:convnext_atto:64", "timm:vit_tiny_patch16_224:224",
    "timm:swin_tiny_patch4_window7_224:224", "hf:bert", "hf:opt", "hf:llama", "hf:t5", "hf:gpt2",
]  # fmt: skip


def error(graph: Graph, pruned: Graph, batches: list[Any]) -> float:
    """The squared error of all real outputs, as a share of their squares."""
    lost = whole = 0.0
    for batch in batches:
        for y, z in zip(graph.run(batch), pruned.run(batch), strict=True):
            if isinstance(y, torch.Tensor) and y.is_floating_point():
                assert bool(z.isfinite().all())
                lost += float((z - y).double().square().sum())
                whole += float(y.double().square().sum())
    return lost / whole


def refit_over_masked(name: str, *, count: int = 12) -> float:
    case = build(name)
    redraw(case.model)
    graph = capture(case.model, case.args, case.kwargs)
    data = [case.drawn(seed, [value.name for value in graph.inputs]) for seed in range(count)]
    unseen = data[-3:]
    masked = regauge.optimize(graph, "prune{ratio=0.25}")
    refitted = regauge.optimize(graph, "prune{ratio=0.25,score=l2}", data=data[:-3])
    return error(graph, refitted, unseen) / error(graph, masked, unseen)


@pytest.mark.sweep
@pytest.mark.skipif(not LIST.exists(), reason="the model list lies in shared/tools beside the repository")
@pytest.mark.parametrize("name", NAMES if "sweep" in " ".join(sys.argv) else ["any"])
def test_refitted_networks_are_nearer_than_masked_ones(name: str) -> None:
    for library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library)
    assert refit_over_masked(name) < 1
