"""Keeping means and norms what they were: the exact folds for what averages over a Dim that was cut.

What averages over d indices of which d' are kept sees fewer, where the original with the removed entries set to zero
sees zeros. For these two the difference is a number, and the result is made the masked original exactly:

    mean over the Dim      times d' / d
    RMSNorm over the Dim   gain times sqrt(d / d'), eps times d / d'

since sqrt(S / d' + eps d / d') = sqrt(d / d') sqrt(S / d + eps). LayerNorm, GroupNorm, variances and softmax have no
such fold: they also shift, by what they see. The scale of attention is a number in the graph, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.edit import Builder, replace_uses, set_input, set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.base import Context


def preserve(original: Graph, pruned: Graph, *, by: str) -> int:
    """Let means and RMSNorms of ``pruned``, which is ``original`` resized, give what they gave; returns how many.

    Exact where what was removed is zero in the masked original when it is averaged. Nodes inside of branches and loops
    stay as they are.
    """
    twins = {node.name: node for node in original.nodes}
    build = Builder(pruned, by=by)
    done = 0
    for node in pruned.nodes:
        was = twins.get(node.name)
        if was is None or was.op != node.op or node.op not in _FOLDS:
            continue
        kept = _share_kept(was, node)
        if kept != 1:
            with build.at(node):
                _FOLDS[node.op](build, node, kept)
            done += 1
    return done


def _share_kept(was: Node, node: Node) -> float:
    """d' / d: how many of the entries that one result averages over are left."""
    before, now = was.inputs[0], node.inputs[0]
    if not isinstance(before, Value) or not isinstance(now, Value) or before.rank != now.rank:
        return 1.0
    axes = _averaged(node, now.rank)
    pairs = [(before.shape[axis], now.shape[axis]) for axis in axes]
    return math.prod(int(b) / int(a) for a, b in pairs if a != b)


def _averaged(node: Node, rank: int) -> list[int]:
    if node.op == "rms_norm":
        return list(range(rank - len(node.attributes["normalized_shape"]), rank))
    dims = node.attributes.get("dims")
    return list(range(rank)) if dims is None else [int(dim) % rank for dim in dims]


def _fold_rms_norm(build: Builder, node: Node, kept: float) -> None:
    value = node.output
    eps = node.attributes.get("eps")
    if eps is None:
        assert isinstance(value.dtype, torch.dtype)
        eps = torch.finfo(value.dtype).eps
    node.attributes["eps"] = float(eps) / kept
    gain = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(gain, Parameter):
        _scale_result(build, node, kept**-0.5)
        return
    scaled = gain.tensor.detach() * kept**-0.5
    if len(gain.uses) == 1:
        set_weight(build.graph, gain, scaled, by=build.by)
    else:
        set_input(node, 1, build.parameter(build.unique(f"{gain.name}_preserved"), scaled, gain.kind), build.graph)


def _scale_result(build: Builder, node: Node, factor: float) -> None:
    """Let everything that reads the result read it times a factor."""
    old = node.output
    new = build.mul(old, factor, name=f"{old.name}_preserved")
    replace_uses(build.graph, old, new)
    set_input(new.producer, 0, old, build.graph)


_FOLDS = {"mean": _scale_result, "rms_norm": _fold_rms_norm}
PRESERVED = frozenset(_FOLDS)
_RECOMPUTED = {"normalise", "reduce"}


def note_recomputed(graph: Graph, dims: Sequence[Dim], preserved: bool, context: Context) -> None:
    """Say where the result is not the masked original: something normalises or averages over a Dim that was cut."""
    cut, found = set(dims), dict[str, set[Dim]]()
    for node, call in graph.axes.calls.items():
        for role, extent in call.roles:
            if role in _RECOMPUTED and node.op != "sum" and not (preserved and node.op in PRESERVED):
                found.setdefault(node.op, set()).update(dim for dim in leaves(extent) if dim in cut)
    for op, over in found.items():
        if over:
            context.note(f"{op} is computed over the kept indices of {len(over)} Dim{'s' if len(over) > 1 else ''}")
