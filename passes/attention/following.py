"""Writing attention layers that read the keys and values of another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.ir.edit import Builder, record
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.attention.entries import Tracer
from regauge.passes.attention.layer_groups import Follower
from regauge.passes.attention.placement import Path
from regauge.passes.attention.sharing import all_or_nothing, projected, take_place, write_output
from regauge.passes.attention.sites import Heads, Site


def write_follower(graph: Graph, site: Site, leader: Node, new: Follower, *, by: str) -> Value:
    """Let a site read the keys and values that the attention node ``leader`` reads; returns the result, a new node.

    ``graph`` is changed; what made the site's own keys and values goes. Refusal, before that, where its queries cannot
    be written anew.
    """
    query, read = site.parts[0], site.node.inputs[0]
    assert isinstance(read, Value)
    path = Path(Tracer(graph), query, read)
    build = Builder(graph, by=by)
    with build.at(site.node), all_or_nothing(build):
        (y,) = projected(build, [(query.layer, new.query.entries(path.entries))])
        asked = path.laid_out(build, y, query.count)
        attributes = {**site.node.attributes, "enable_gqa": leader.attributes["enable_gqa"]}
        operands = (asked, *leader.inputs[1:3], *site.node.inputs[3:])
        result: Value = build(site.node.op, *operands, name=site.node.output.name, **attributes)
    write_output(graph, site, new.output, new.shift, by)
    take_place(graph, build, site.node.output, result, by)
    record(graph, by, f"{site.node.name}: keys and values of {leader.name}")
    return result


def follower_misfit(tracer: Tracer, leader: Site, site: Site) -> str | None:
    """Why a layer cannot read the keys and values of an earlier one; None where it can."""
    return _other_heads(tracer, leader, site) or _other_positions(leader, site)


def _other_heads(tracer: Tracer, leader: Site, site: Site) -> str | None:
    for mine, its in zip(site.parts[1:3], leader.parts[1:3], strict=True):
        if (mine.count, mine.size) != (its.count, its.size) or not torch.equal(mine.head_of, its.head_of):
            return "its heads are others than those of the layer whose keys and values it would read"
        if mine.head_of.tolist() != sorted(mine.head_of.tolist()):
            return "its heads are shared in turns"
        if not torch.equal(mine.pairs, its.pairs) or not _same(_tables(tracer, mine), _tables(tracer, its)):
            return "its keys are at other positions, or have other gains"
    return None


def _other_positions(leader: Site, site: Site) -> str | None:
    if site.is_cross != leader.is_cross or site.node.attributes["is_causal"] != leader.node.attributes["is_causal"]:
        return "it looks at other positions than the layer whose keys and values it would read"
    for slot in (1, 2):
        own, other = site.node.inputs[slot], leader.node.inputs[slot]
        assert isinstance(own, Value) and isinstance(other, Value)
        if own.shape[:-3] != other.shape[:-3] or own.shape[-2:] != other.shape[-2:]:
            return "its keys are of other positions"
    if any(a.x.shape[:-1] != b.x.shape[:-1] for a, b in zip(site.parts[:3], leader.parts[:3], strict=True)):
        return "it reads inputs of another shape"
    return None


def _tables(tracer: Tracer, heads: Heads) -> list[torch.Tensor]:
    """What the entries of a projection are multiplied by on their way: rotary positions, gains."""
    made = {heads.layer.node.output, *(value for node in heads.nodes for value in node.outputs)}
    others = [operand for node in heads.nodes for operand in node.inputs if operand not in made]
    return [torch.as_tensor(tracer.numbers(operand)) for operand in others if operand is not None]


def _same(tables: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    if len(tables) != len(others):
        return False
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(tables, others, strict=True))
