"""Rotations before few bits: char_gpt as it is, rotated, and with the directions of great variance read apart.

    python benchmarks/subspaces.py [--perplexity] [--write]

Decibels of the logits on windows of text, with weights of all linear layers and what they read rounded to so many
bits: weights with a scale for each output, what is read with a range for the whole tensor or for each token. Where
layers read directions apart (ResQ), their weights and what they read have 8 bits. planted: the same network with two
channels behind each norm twenty times as large, which the layers behind take back: the same function, with outliers.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks import char_gpt
from benchmarks.report import append_table, environment
from regauge.ir.gauge.classes import DIAGONAL
from regauge.ir.gauge.frames import find_frames
from regauge.ir.gauge.insertion import scaled
from regauge.ir.graph import Graph
from regauge.ir.storage.weights import dense
from regauge.passes.calibration.layers import layer_of
from regauge.passes.quantization.grid import Form, Grid
from regauge.passes.quantization.subspaces import least_bits

HEADS = ["network", "rounded", "as it is", "rotate", "rotate{kind=pca}"]
KINDS = ("hadamard", "pca")
PLANTED, TIMES = [3, 9], 20.0


def planted(graph: Graph) -> Graph:
    """The same function with outliers behind norms."""
    scales = {}
    for frame in find_frames(graph):
        gains = [side for side in frame.writers if side.parameter.rank == 1]
        if frame.gauge & DIAGONAL and any(node.op == "layer_norm" for g in gains for node, _ in g.parameter.uses):
            scale = torch.ones(int(frame.dim.size), dtype=torch.float64)
            scale[PLANTED] = TIMES
            scales[frame] = scale
    return scaled(graph, scales)


def decibels(graph: Graph, inputs: Any, bits: int, *, by_token: bool) -> float:
    result, read, least = graph.copy(), {}, least_bits(graph)
    for node in result.nodes:
        layer = layer_of(node)
        if layer is not None:
            own = max(bits, least.get(layer.weight.name, 0))
            rows = layer.matrix(layer.weight.tensor.detach())
            form = Form(Grid(own, symmetric=own == 8), rows.shape[1])
            layer.weight.weight = dense(layer.stored(form.rounded(rows).values))
            read[node.inputs[0]] = Grid(own, symmetric=False)

    def cut(node: Any, results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        grid, x = read.get(node.outputs[0]), results[0]
        if grid is None:
            return None
        ends = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if by_token else (x.min(), x.max())
        scale, zero = grid.span(*ends)
        return ((grid.codes(x, scale, zero) - zero) * scale,)

    (a,), (b,) = graph.run(inputs), result.run(inputs, hook=cut)
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


def measure(perplexity: bool) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(64)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    data, held_out = [(part,) for part in windows.split(32)], (char_gpt.calibration_windows(16, seed=9),)
    for name, own in (("char_gpt", graph), ("char_gpt, planted", planted(graph))):
        turned = [own, *(regauge.optimize(own, f"rotate{{kind={kind}}}", data=data) for kind in KINDS)]
        for bits in (4, 6):
            for by_token, ranges in ((False, "whole ranges"), (True, "ranges of tokens")):
                found = [f"{decibels(one, held_out, bits, by_token=by_token):.1f} dB" for one in turned]
                yield [name, f"weights and inputs, {bits} bits, {ranges}", *found]
        for method in ("nearest", "descent") if perplexity else ():
            step = f"quantize{{scheme=w3,target=reference,embeddings=false,method={method}}}"
            small = [regauge.optimize(one, step, data=data) for one in turned]
            found = [f"{char_gpt.perplexity(one.to_torch().eval()):.3f}" for one in small]
            yield [name, f"weights, 3 bits, method={method}: perplexity", *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perplexity", action="store_true", help="of weights of 3 bits, too")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for row in measure(options.perplexity):
        print("  ".join(row), flush=True)
        rows.append(row)
    print(environment())
    if options.write:
        append_table("Rotations before few bits", HEADS, rows, "64 windows of text.")


if __name__ == "__main__":
    main()
