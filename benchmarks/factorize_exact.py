"""Layers of whole models as products of full rank, in every form: how far the outputs move in float64.

    python benchmarks/factorize_exact.py [--models NAME ...] [--limit 600] [--log FILE]

The models are the 66 of the coverage list, with weights drawn anew, each in a process of its own. Of layers of the same
sizes one is factorized, and of those of more than LARGEST entries only what a model has no smaller one of its kind of.
A log is gone on with where it ends.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils import _pytree

import regauge
from benchmarks.isolated import Unfinished, isolated
from benchmarks.mask_oracle import relative_error
from benchmarks.model_case import redraw
from benchmarks.zoo import build, names
from regauge.ir.edit import remove_dead
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.factorization.blocks import links_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import write_chain
from regauge.passes.factorization.forms import Form
from regauge.passes.factorization.problems import plain_problems

EXACT = 1e-10
LARGEST = 1 << 16
Found = list[tuple[str, int, float]]
"""For each form how many layers became products, and how far the outputs moved, as a share of their largest entries."""


def moved(name: str) -> Found:
    """What the forms do to one model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case = build(name).double()
    redraw(case.model)
    graph = regauge.capture(case.model, case.args, case.kwargs, verify=False)
    given = [x for x in _pytree.tree_leaves((case.args, case.kwargs)) if isinstance(x, torch.Tensor)]
    before = _outputs(graph, given)
    found = []
    for form in FORMS.values():
        changed = graph.copy()
        layers = _chosen(changed, form)
        for layer in layers:
            numbers = min(form.lossless(layer), key=lambda own: max(own) + min(own))  # axes of about the same size
            write_chain(changed, layer, links_of(form, plain_problems(layer), numbers)[0], by="full-rank")
        remove_dead(changed)
        found.append((form.name, len(layers), relative_error(_outputs(changed, given), before) if layers else 0.0))
    return found


def _outputs(graph: Graph, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x for x in run(graph, given) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _chosen(graph: Graph, form: Form) -> list[Layer]:
    """Of layers that a form fits one of each size and way; large ones where there is no small one of their kind."""
    fitting = [
        layer
        for node in graph.nodes
        if (layer := layer_of(node, blocks=True)) is not None and form.misfit(layer) is None
    ]
    found, kinds, ways = list[Layer](), set[object](), set[object]()
    for layer in sorted(fitting, key=lambda own: own.weight.tensor.numel()):
        node = layer.node
        kind = node.op, layer.blocks > 1, layer.taps > 1
        way = node.op, layer.weight.shape, str(sorted(node.attributes.items())), layer.bias is None
        if way not in ways and (layer.weight.tensor.numel() <= LARGEST or kind not in kinds):
            found.append(layer)
        ways.add(way)
        kinds.add(kind)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="models to run (default: the 66 of the list)")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one model")
    parser.add_argument(
        "--log", type=Path, help="a file that lines are added to; models that are in it are passed over"
    )
    options = parser.parse_args()
    done = {line.split()[0] for line in options.log.read_text().splitlines()} if _exists(options.log) else set()
    for name in options.models or names():
        if name in done:
            continue
        try:
            found = isolated(moved, name, limit=options.limit)
            worst = max(found, key=lambda own: own[2])
            forms = " ".join(f"{form}:{layers}:{error:.0e}" for form, layers, error in found if layers)
            line = f"{name} {'exact' if worst[2] <= EXACT else 'WRONG'} {forms}"
        except Unfinished as problem:
            line = f"{name} {problem}"
        print(line, flush=True)
        if options.log is not None:
            with options.log.open("a") as log:
                log.write(line + "\n")


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


if __name__ == "__main__":
    main()
