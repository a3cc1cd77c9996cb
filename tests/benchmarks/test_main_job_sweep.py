"""Whole networks through the main job in one call, verified at each step: ``pytest -m sweep``.

Minutes each, most of them where channels are pruned and convolutions factorized. They need what
``test_coverage_sweep`` needs.
"""

from pathlib import Path

import pytest
import torch
from benchmarks.model_case import SHARED, redraw
from benchmarks.zoo import build

import regauge
from main_job_steps import STEPS, Seen, agreed, regions_come_along
from regauge.ir.graph import Graph

# What parameters and bytes are left behind each step, shares of those of the original.
NETWORKS = {
    "timm:mobilenetv3_small_100:64": (64, (0.99, 0.7, 0.56), 0.2),
    "timm:resnet18:64": (32, (1.0, 0.7, 0.56), 0.16),
}


@pytest.mark.sweep
@pytest.mark.skipif(not (SHARED / "tools").is_dir(), reason="the model list of shared/tools is not here")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_goes_through_all_of_it(name: str, tmp_path: Path) -> None:
    size, left, least = NETWORKS[name]
    model = build(name).model
    redraw(model)
    torch.manual_seed(0)
    graph = regauge.capture(model, (torch.randn(2, 3, size, size),), dynamic={0: {0: "batch"}})
    seen: list[Graph] = []
    passes = [one for text in STEPS for one in (text, Seen(seen.append))]
    small = regauge.optimize(graph, passes, data=[torch.randn(4, 3, size, size) for _ in range(2)])
    before, inputs = small.report.before, torch.randn(3, 3, size, size)
    for number, own in enumerate(seen):
        agreed(own, inputs, tmp_path / "step.onnx")
        after = small.report.passes[2 * number].after
        if number < len(left):
            assert after.parameters / before.parameters == pytest.approx(left[number], abs=0.02), STEPS[number]
    assert small.report.after.bytes < least * before.bytes
    regions_come_along(*seen[-2:], inputs, tmp_path / "step.onnx")
