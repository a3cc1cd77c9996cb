"""Adjacent blocks of one structure as one block, whose weights are the mean of theirs; and back.

    x2 = block(block(x0, w0), w1)    ->    x1 = block(x0, (w0 + w1) / 2)    ->    x2 = block(block(x0, w), w)

Zou et al. 2024, A Multi-Level Framework for Accelerating Training Transformer Models, section 3: layers are coalesced
as widths are, by a matrix that takes the mean of two neighbours, and de-coalesced by copies. Neither way keeps what
the network computes; it is the mixture of old weights and copies that training goes on from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Parameter
from regauge.ir.storage.weight_edits import computed_weight
from regauge.passes.depth.parts import Order, Part
from regauge.passes.depth.removal import removable, without
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.sharing.structure import repeated


@dataclass(frozen=True)
class JoinedBlocks:
    """A ``graph`` with one block for each of the ``pairs`` of names, the first of which it has.

    ``stands`` says of each weight of the blocks that went which one stands for it.
    """

    graph: Graph
    pairs: tuple[tuple[str, str], ...]
    stands: Mapping[str, str]


def joined_blocks(
    graph: Graph, include: Sequence[str], exclude: Sequence[str], left: Counter[str], *, by: str
) -> JoinedBlocks:
    """Neighbours in the order of the graph; ``include`` and ``exclude`` are globs on the names of blocks and weights.

    ``left`` counts the blocks that stay as they are, by reason.
    """
    structures, order = repeated(graph), Order(graph)
    names = {part.name for own in structures for part in own.parts}
    names |= {weight.name for own in structures for weights in own.weights for weight in weights}
    for kind, patterns in (("include", include), ("exclude", exclude)):
        check_patterns(kind, patterns, names, what="block or weight of one")
    pairs, stands = list[tuple[Part, Part]](), dict[Parameter, Parameter]()
    for structure in structures:
        blocks = list(zip(structure.parts, structure.weights, strict=True))
        while blocks:
            (first, own), *rest = blocks
            reason = _misfit(order, first, own, rest[0] if rest else None, include, exclude)
            if reason is not None:
                left[reason] += 1
                blocks = rest
                continue
            second, others = rest[0]
            pairs.append((first, second))
            stands.update(zip(others, own, strict=True))
            blocks = rest[1:]
    if not pairs:
        return JoinedBlocks(graph, (), {})
    result, _ = without(graph, [second for _, second in pairs], by=by)
    for other, kept in stands.items():
        if not _has_numbers(kept):
            continue
        target = result.parameters[kept.name]
        assert isinstance(target.dtype, torch.dtype)
        weight = computed_weight(lambda a, b: (a + b) / 2, [kept, other], target.weight.shape, target.dtype)
        set_weight(result, target, weight, by=by)
    found = {other.name: kept.name for other, kept in stands.items()}
    return JoinedBlocks(result, tuple((first.name, second.name) for first, second in pairs), found)


def _misfit(
    order: Order,
    part: Part,
    own: Sequence[Parameter],
    following: tuple[Part, Sequence[Parameter]] | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    """Why a block is not joined with the one that follows it in its structure."""
    if following is None or following[0].source is not part.result:
        return "blocks that have no partner behind them"
    second, others = following
    named = [part.name, second.name, *(weight.name for weight in (*own, *others))]
    if (include and not matches(named, include)) or matches(named, exclude):
        return "blocks that are not included, or excluded"
    if any(not _has_numbers(a) and not torch.equal(a.tensor, b.tensor) for a, b in zip(own, others, strict=True)):
        return "blocks that hold other integers or truth values than their neighbours"
    return removable(order, second)


def _has_numbers(parameter: Parameter) -> bool:
    return isinstance(parameter.dtype, torch.dtype) and parameter.dtype.is_floating_point
