"""``merge``: several trained networks of one architecture as one network of the same size.

average        sum of weights_i * theta_i, each brought into the order of the first (Git Re-Basin)
task vectors   base + scale * sum of weights_i * (theta_i - base)      (Ilharco et al. 2023)
TIES           of each task vector the largest entries, of each entry those of the sign that most has, their mean
               (Yadav et al. 2023)
LiNeS          scale + deeper * (l - 1) / (L - 1) at depth l of L        (Wang et al. 2025)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from regauge.ir.edit import record, set_weight
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph, Parameter, Value
from regauge.passes.base import Cut
from regauge.passes.merging.matching import Match, check_alike, cosines, match
from regauge.passes.name_patterns import matches
from regauge.passes.report import reported

Scale: TypeAlias = float | Mapping[str, float]
_NAME = "merge"
_SHOWN = 3  # weights of a network that are least alike


def merge(
    graphs: Sequence[Graph],
    *,
    base: Graph | None = None,
    weights: Sequence[float] | None = None,
    scale: Scale = 1.0,
    deeper: float = 0.0,
    keep: float | None = None,
    align: bool | None = None,
) -> Graph:
    """One graph whose weights are made of those of several, which are of one architecture.

    Without ``base`` it is their average, with ``weights`` (equal shares if not given) that sum up to 1, and each is
    first brought into the order of the first unless ``align`` is False. With ``base``, which all were trained from, the
    changes are added up, each with its ``weights`` (1 if not given), times ``scale``: a number, or one for each block,
    by globs on names of parameters of which the first that matches counts (1 where none does). ``deeper`` is what the
    last layer's scale has more than the first's, in even steps; depth counts the layers with weights before one, where
    the paper counts blocks. ``keep`` is the share of entries of each change that TIES keeps, whose mean takes the place
    of the sum. Statistics of batch norms are merged as weights are; whole numbers are those of the first.

    The ``report`` of the result says for each network which Dims were brought into another order, the cosine of its
    weights with those of the first before and after, which weights are least alike then, and why Dims kept their order.
    Raises GraphError for graphs of different architectures, and for options that do not go together.
    """
    since = time.perf_counter()
    _check(graphs, base, weights, scale, deeper, keep)
    check_alike([*graphs, *([base] if base is not None else [])])
    first = graphs[0] if base is None else base
    matches: list[Match | None] = [None] * len(graphs)
    if align if align is not None else base is None:
        matches = [None if graph is first else match(graph, first, by=_NAME) for graph in graphs]
        graphs = [graph if own is None else own.graph for graph, own in zip(graphs, matches, strict=True)]
    shares = [1.0 if base is not None else 1 / len(graphs)] * len(graphs) if weights is None else list(weights)
    result = first.copy()
    factors = _factors(result, scale, deeper) if base is not None else {}
    tensors, start = [_tensors(graph) for graph in graphs], None if base is None else _tensors(base)
    kept = None if keep is None or start is None else [_trimmed(own, start, keep) for own in tensors]
    for parameter in filter(_is_real, result.all_parameters()):
        merged = _merged(parameter.name, shares, tensors, start, factors, kept)
        set_weight(result, parameter, merged.to(parameter.tensor.dtype), by=_NAME)
    record(result, _NAME, f"{len(graphs)} networks")
    return _reported(result, first, graphs, matches, since)


def _reported(
    result: Graph, first: Graph, graphs: Sequence[Graph], matches: Sequence[Match | None], since: float
) -> Graph:
    notes, cuts, apart = list[str](), list[Cut](), dict[str, int]()
    for place, (graph, own) in enumerate(zip(graphs, matches, strict=True)):
        if graph is first:
            continue
        name = f"network {place + 1}"
        alike = cosines(graph, first) if own is None else own.after
        if own is None:
            notes.append(f"{name}: cosine with the first or the base {alike['']:.3f}, not matched")
        else:
            before, after = own.agreement
            notes.append(f"{name}: cosine with the first or the base {before:.3f} -> {after:.3f}")
            cuts += [
                Cut(dim, size, size, f"{name}: {dim}: {moved} of {size} indices in another place")
                for dim, (moved, size) in own.moved.items()
            ]
            apart = dict(own.apart)
        least = sorted((value, weight) for weight, value in alike.items() if weight)[:_SHOWN]
        notes.append(f"{name}: least alike {', '.join(f'{weight} {value:.3f}' for value, weight in least)}")
    whole = sum(not _is_real(parameter) for parameter in result.all_parameters())
    if whole:
        notes.append(f"whole numbers and constants of the first or the base kept: {whole}")
    return reported(first, result, _NAME, since, cuts, apart, notes=notes)


def _check(graphs: Sequence[Graph], base: Graph | None, weights: Any, scale: Any, deeper: float, keep: Any) -> None:
    if not graphs:
        raise GraphError("merge: there is no graph: give a list of them")
    if weights is not None and len(weights) != len(graphs):
        raise GraphError(f"merge: {len(weights)} weights for {len(graphs)} graphs: give one each")
    if base is None and (scale != 1.0 or deeper or keep is not None):
        raise GraphError(
            "merge: scale, deeper and keep are for changes: give the base that the graphs were trained from"
        )
    if base is None and weights is not None and abs(sum(weights) - 1) > 1e-6:
        raise GraphError(f"merge: the weights of an average sum up to 1, not to {sum(weights):g}")
    if keep is not None and not 0 < keep <= 1:
        raise GraphError(f"merge: keep={keep:g} is no share of entries: give one above 0, up to 1")


def _merged(
    name: str,
    shares: Sequence[float],
    tensors: Sequence[Mapping[str, torch.Tensor]],
    start: Mapping[str, torch.Tensor] | None,
    factors: Mapping[str, float],
    kept: Sequence[float] | None,
) -> torch.Tensor:
    """One parameter, in double precision: the average, or that of the base and the changes since."""
    sides = [own[name].double() for own in tensors]
    if start is None:
        return _sum(shares, sides)
    before = start[name].double()
    changes = [side - before for side in sides]
    change = _sum(shares, changes) if kept is None else _elected(shares, changes, kept)
    return before + factors[name] * change


def _sum(shares: Sequence[float], sides: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([share * side for share, side in zip(shares, sides, strict=True)]).sum(0)


def _is_real(parameter: Parameter) -> bool:
    real = isinstance(parameter.dtype, torch.dtype) and parameter.dtype.is_floating_point
    return real and parameter.kind != "constant"


def _tensors(graph: Graph) -> dict[str, torch.Tensor]:
    return {parameter.name: parameter.tensor.detach() for parameter in graph.all_parameters() if _is_real(parameter)}


# -- TIES --------------------------------------------------------------------------------------------------------------


def _trimmed(tuned: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], keep: float) -> float:
    """From which size on entries of a change are among the share that is kept, over all parameters."""
    sizes = torch.cat([(tuned[name].double() - start[name].double()).abs().reshape(-1) for name in start])
    count = max(1, round(keep * len(sizes)))
    return float(sizes.kthvalue(len(sizes) - count + 1).values)


def _elected(shares: Sequence[float], changes: Sequence[torch.Tensor], least: Sequence[float]) -> torch.Tensor:
    """The mean of what is left of each change, where that has the sign of the sum."""
    trimmed = [torch.where(c.abs() >= t, s * c, 0.0) for s, c, t in zip(shares, changes, least, strict=True)]
    stacked = torch.stack(trimmed)
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return torch.where(agree, stacked, 0.0).sum(0) / agree.sum(0).clamp(min=1)


# -- scales ------------------------------------------------------------------------------------------------------------


def _factors(graph: Graph, scale: Scale, deeper: float) -> dict[str, float]:
    """What the change of each parameter is times."""
    names = [parameter.name for parameter in graph.all_parameters()]
    if isinstance(scale, Mapping):
        for pattern in scale:
            if not matches(names, [pattern]):
                raise GraphError(f"merge: scale has {pattern!r}, which matches no parameter")
        found = {n: next((v for pattern, v in scale.items() if matches([n], [pattern])), 1.0) for n in names}
    else:
        found = dict.fromkeys(names, float(scale))
    depths = _depths(graph) if deeper else {}
    last = max(depths.values(), default=1)
    return {n: found[n] + deeper * (depths.get(n, 1) - 1) / max(1, last - 1) for n in names}


def _depths(graph: Graph) -> dict[str, int]:
    """For each parameter the most layers with weights on a way from an input through the one that reads it."""
    depth: dict[Value, int] = {}
    found: dict[str, int] = {}
    for node in graph.nodes:
        weights = [v for _, v in node.operands() if isinstance(v, Parameter)]
        layer = any(weight.kind == "parameter" and weight.rank > 1 for weight in weights)
        here = max((depth.get(value, 0) for _, value in node.operands()), default=0) + layer
        depth.update(dict.fromkeys(node.outputs, here))
        for weight in weights:
            found[weight.name] = min(found.get(weight.name, max(1, here)), max(1, here))
    return found
