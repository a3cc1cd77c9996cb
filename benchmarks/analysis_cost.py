"""What the axis analysis costs: beside torch-pruning's dependency graph, and as a graph grows.

    python benchmarks/analysis_cost.py [--write]

First table: from a captured graph to all dependency groups, against torch-pruning's ``build_dependency`` plus listing
all groups, on models where the peer finishes; medians of interleaved runs. Second: a residual stack of 1k, 4k and 16k
nodes (convolution, batch norm, relu, add), measured in processes of their own, with cold caches, by ``timeit`` (so
without Python's collector, whose passes over the heap depend on what else lives there); the last column is the growth
over the row above, 4 being linear.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import timeit
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.isolated import isolated
from benchmarks.report import append_table, environment
from benchmarks.zoo import build
from regauge.ir.dims.groups import dependency_groups
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value

MODELS = [
    "timm:resnet18:64", "timm:resnext50_32x4d:64", "timm:regnety_002:64", "timm:densenet121:64",
    "timm:efficientnet_b0:64", "timm:mobilenetv3_small_100:64", "timm:convnext_atto:64",
    "timm:vit_tiny_patch16_224:224", "timm:swin_tiny_patch4_window7_224:224", "timm:hrnet_w18_small:64",
    "timm:inception_v3:128", "timm:repvgg_a0:64", "hf:bert", "hf:opt", "hf:vit",
]  # fmt: skip
REPEATS = 9  # at least
SECONDS = 1.0  # of measuring, at least
PROCESSES = 11  # each has its memory elsewhere, which moves the medians of short work by a tenth


def seconds(function: Callable[[], object]) -> float:
    """The time of one call, without Python's collector: what the other side left is not collected meanwhile."""
    return timeit.timeit(function, number=1)


def list_groups(graph: Graph) -> int:
    """Analyse from scratch and list all groups; nothing is kept, as nothing is of torch-pruning's graph."""
    count = len(dependency_groups(graph))
    graph._analysis = None
    return count


def compare_with_peer(name: str) -> list[str]:
    import torch_pruning as tp

    import regauge

    case = build(name)
    graph = regauge.capture(case.model, case.args, case.kwargs, verify=False)
    inputs = case.kwargs or case.args

    def peer() -> None:
        dependency = tp.DependencyGraph().build_dependency(case.model, example_inputs=inputs)
        list(dependency.get_all_groups(root_module_types=[torch.nn.modules.conv._ConvNd, torch.nn.Linear]))

    list_groups(graph)
    times: list[tuple[float, float]] = []
    while len(times) < REPEATS or sum(map(sum, times)) < SECONDS:
        times.append((seconds(lambda: list_groups(graph)), seconds(peer)))
    mine = statistics.median(t for t, _ in times)
    theirs = statistics.median(t for _, t in times)
    return [name, str(len(graph)), f"{mine * 1e3:.1f}", f"{theirs * 1e3:.1f}", f"{theirs / mine:.1f}"]


def residual_stack(nodes: int) -> Graph:
    """A stack of conv - batch norm - relu - add blocks with about so many nodes; shapes are given, not inferred."""
    graph = Graph("stack")
    build_node = Builder(graph)
    shape = ((2, 16, 8, 8), torch.float32)
    value: Value = build_node.input("x", shape[0], torch.float32)
    weight, vector = torch.zeros(16, 16, 3, 3), torch.ones(16)
    for block in range(nodes // 4):
        name = f"block{block}"
        h = build_node("conv", value, build_node.parameter(f"{name}.conv", weight), padding=(1, 1), results=[shape])
        statistics_ = [build_node.parameter(f"{name}.{part}", vector) for part in ("gain", "shift", "mean", "var")]
        h = build_node("batch_norm", h, *statistics_, training=False, momentum=0.1, eps=1e-5, results=[shape])
        h = build_node("relu", h, results=[shape])
        value = build_node("add", value, h, results=[shape]) if block else h
    graph.outputs = [build_node.linear(value, build_node.parameter("head", torch.zeros(5, 8)))]
    return graph


def stack_seconds(nodes: int) -> float:
    """The analysis of a residual stack of so many nodes, measured in this process."""
    torch.set_num_threads(1)
    graph = residual_stack(nodes)
    _ = graph.nodes
    larger_than_caches = torch.zeros(16_000_000)
    empty_caches = partial(larger_than_caches.add_, 1)  # else the second run on a small graph finds it there
    return statistics.median(timeit.repeat(partial(list_groups, graph), empty_caches, number=1, repeat=2 * REPEATS))


def growth() -> list[list[str]]:
    rows: list[list[str]] = []
    previous = 0.0
    for nodes in (1000, 4000, 16000):
        median = statistics.median(isolated(stack_seconds, nodes, limit=300.0) for _ in range(PROCESSES))
        rows.append([str(nodes), f"{median * 1e3:.1f}", f"{median / previous:.2f}" if previous else ""])
        previous = median
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        rows.append(compare_with_peer(name))
        print(
            "{:40s} {:>6s} nodes  ours {:>8s} ms  torch-pruning {:>9s} ms  ratio {:>6s}".format(*rows[-1]), flush=True
        )
    ratios = [float(row[-1]) for row in rows]
    note = f"least ratio {min(ratios):.1f}, median {statistics.median(ratios):.1f}" if ratios else ""
    print(note)
    steps = growth()
    for row in steps:
        print("{:>6s} nodes {:>7s} ms  x{}".format(*row))
    print(environment())
    if options.write:
        append_table("Analysis cost", ["model", "nodes", "ours ms", "torch-pruning ms", "ratio"], rows, note)
        append_table("Analysis growth", ["nodes", "ms", "growth"], steps)


if __name__ == "__main__":
    main()
