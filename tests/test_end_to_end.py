"""The main job: simplify, prune, factorize, quantize and fuse in one call; torch and ONNX agree at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regauge
from decoders import Rotary, characters, decoder, stepped
from layered_networks import ResidualNetwork, images, redrawn
from main_job_steps import STEPS, Seen, agreed, regions_come_along
from regauge.backends.run_onnxruntime import Session
from regauge.cli import main
from regauge.ir.cost import figures
from regauge.ir.fusion.fused import body_of, fused_nodes
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.graph import Graph

PASSES = ",".join(STEPS)
CACHED = ",".join([*STEPS[:-1], "kv-cache", STEPS[-1]])


@dataclass(frozen=True)
class Job:
    """A network, data, inputs of other sizes, and what each step leaves: parameters, bytes, the greatest error."""

    graph: Graph
    data: list[torch.Tensor]
    inputs: torch.Tensor
    steps: list[tuple[int, int, float]]


def decoder_job() -> Job:
    torch.manual_seed(0)
    steps = [(16183, 64764, 1e-6), (11308, 45264, 0.04), (9036, 36176, 0.08), *[(9439, 11960, 0.08)] * 2]
    return Job(decoder(Rotary()), [characters(8, 12, seed) for seed in (1, 2)], characters(3, 7), steps)


def network_job() -> Job:
    graph = regauge.capture(redrawn(ResidualNetwork()), (images(),), dynamic={0: {0: "batch"}})
    steps = [(12085, 48340, 1e-5), (8399, 33596, 0.05), (6707, 26828, 0.05), *[(6864, 7721, 0.05)] * 2]
    return Job(graph, [images(16, seed) for seed in (1, 2)], images(3), steps)


@pytest.mark.parametrize("make", [decoder_job, network_job])
def test_torch_and_files_agree_at_every_step(make: Callable[[], Job], tmp_path: Path) -> None:
    job = make()
    seen: list[Graph] = []
    passes = [one for text in STEPS for one in (text, Seen(seen.append))]
    small = regauge.optimize(job.graph, passes, data=job.data)
    (wanted,) = job.graph.run(job.inputs)
    for number, (graph, (parameters, size, most)) in enumerate(zip(seen, job.steps, strict=True)):
        after = small.report.passes[2 * number].after
        assert after == figures(graph)
        assert (after.parameters, after.bytes) == pytest.approx((parameters, size), rel=0.02), STEPS[number]
        error = (agreed(graph, job.inputs, tmp_path / "step.onnx") - wanted).norm() / wanted.norm()
        assert error < most, STEPS[number]
    quantized, fused = seen[-2:]
    plan = plan_fusion(quantized, contractions=False)
    assert len(plan.kernels) < 0.9 * plan.kernels_before and plan.bytes < plan.bytes_before
    regions_come_along(quantized, fused, job.inputs, tmp_path / "step.onnx")
    again = regauge.optimize(regauge.load(tmp_path / "step.onnx"), "unfuse,dequantize,prune{params=0.9}")
    assert again.report.after.parameters < small.report.after.parameters
    agreed(again, job.inputs, tmp_path / "again.onnx")


def on_files(session: Session) -> Callable[..., Any]:
    return lambda *given: session.run(given)


def test_a_decoder_with_a_cache_goes_through_all_of_it(tmp_path: Path) -> None:
    """Pruned, factorized, quantized, with a cache and fused in one call: steps give what all positions at once do."""
    job = decoder_job()
    whole, cached = (regauge.optimize(job.graph, passes, data=job.data) for passes in (PASSES, CACHED))
    assert fused_nodes(cached) and len(cached.states) == 4
    inside = [node for fused in fused_nodes(cached) for node in body_of(fused).nodes if node.op == "attention"]
    assert len(inside) == 2 and all(node.attributes["lower_right"] for node in inside)  # no mask is read
    assert cached.report.after.parameters == whole.report.after.parameters < 0.6 * whole.report.before.parameters
    (wanted,) = whole.run(job.inputs)
    counts = (3, 1, 1, 2)
    torch.testing.assert_close(stepped(regauge.Steps(cached), job.inputs, counts), wanted, rtol=1e-4, atol=1e-5)
    runs: list[Callable[..., Any]] = [cached.to_torch(), cached.to_torch(kernels="triton")]
    paths = [cached.to_onnx(tmp_path / f"{functions}.onnx", functions=functions) for functions in (False, True)]
    exact = {"session.qdq_matmulnbits_accuracy_level": "0"}  # not in steps of 8 bits of what is read
    runs += [on_files(Session(path, optimisation="off")) for path in paths]
    runs += [on_files(Session(path, settings=exact)) for path in paths]
    for run in runs:
        begin = {"batch": 3, "past": 0}
        states = [torch.zeros([begin.get(str(n), n) for n in state.shape]) for state in cached.inputs[1:]]
        found = []
        for part in job.inputs.split(list(counts), 1):
            with torch.no_grad():
                logits, *states = run(part, *states)
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-5)


def test_a_file_goes_through_all_of_it(tmp_path: Path) -> None:
    job = network_job()
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    job.graph.to_onnx(whole)
    np.savez(tmp_path / "data.npz", **{job.graph.inputs[0].name: torch.cat(job.data).numpy()})
    arguments = ["optimize", str(whole), "-o", str(small), "--data", str(tmp_path / "data.npz"), "--passes"]
    assert main([*arguments, "prune{params=0.001}"]) == 2 and not small.exists()
    assert main([*arguments, PASSES]) == 0
    sessions = [Session(path, optimisation="off") for path in (whole, small)]
    assert sessions[0].inputs == sessions[1].inputs and sessions[0].outputs == sessions[1].outputs
    wanted, found = (session.run([job.inputs])[0] for session in sessions)
    assert (found - wanted).norm() < job.steps[-1][2] * wanted.norm()
    assert small.stat().st_size < 0.82 * whole.stat().st_size  # of weights this small, what names nodes is half
