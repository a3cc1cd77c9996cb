"""All scores by name: what each computes, what it needs, and a line of help. A new one is one entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from regauge.ir.dims.groups import Group
from regauge.ir.errors import PassError
from regauge.ir.gauge.classes import Gauge, gauges
from regauge.ir.graph import Graph
from regauge.passes.allocation.choices import Counts
from regauge.passes.base import GIVE_DATA
from regauge.passes.calibration.losses import Labelled, Loss
from regauge.passes.pruning.activation_scores import activation, activation_norm, wanda
from regauge.passes.pruning.batch_norm_scales import batch_norm_gains
from regauge.passes.pruning.distortion import distortion_scores
from regauge.passes.pruning.loss_scores import LossScores
from regauge.passes.pruning.scores import MemberScores, Normalise, Reduce, Scores, normalised, reduced
from regauge.passes.pruning.weight_scores import chance, geometric_median, lamp, magnitudes

Needs: TypeAlias = Literal["nothing", "data", "loss"]
"""``loss``: batches, and a loss; see :mod:`regauge.passes.calibration.losses` for what it is where none is given."""


@dataclass
class Request:
    """What scores are asked for, and of what."""

    graph: Graph
    groups: Sequence[Group]
    batches: Sequence[Labelled] = ()
    loss: Loss | None = None
    reduce: Reduce | None = None
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    counts: Counts | None = None

    @property
    def inputs(self) -> list[Any]:
        return [batch.inputs for batch in self.batches]

    @cached_property
    def by_loss(self) -> LossScores:
        return LossScores(self.graph, self.groups, self.batches, self.loss, self.seed)

    def reduced(self, members: MemberScores, default: Reduce = "sum") -> Scores:
        how = self.reduce or default
        return {group.dim: reduced(members[group.dim], how, group.choices) for group in self.groups}


@dataclass(frozen=True)
class Criterion:
    """One score: higher is more important.

    ``normalise`` is what is done within a Dim where nothing else is asked; ``apart`` whether it tells an index in one
    head from the same index in another.
    """

    compute: Callable[[Request], Scores]
    needs: Needs
    help: str
    normalise: Normalise = "mean"
    apart: bool = True


def _norms(request: Request, power: int) -> Scores:
    """Norms of slices; of Dims of any gauge the product over members, which no rescaling of one by another changes."""
    members = magnitudes(request.graph, request.groups, power)
    found = request.reduced(members)
    if request.reduce is None:
        classes = gauges(request.graph)
        for group in request.groups:
            if Gauge.GENERAL in classes.get(group.dim, Gauge.FIXED) and len(members[group.dim]) == 2:
                found[group.dim] = reduced(members[group.dim], "prod", group.choices) ** 0.5
    return {dim: scores if power == 1 else np.sqrt(scores) for dim, scores in found.items()}


def _batch_norm(request: Request) -> Scores:
    gains = batch_norm_gains(request.graph, request.groups)
    without = len(request.groups) - len(gains)
    if without:  # exporters fold BatchNorms away, and then there are no gains to go by
        request.notes.append(f"{without} of {len(request.groups)} Dims have no BatchNorm and are scored by l2")
    return {**_norms(request, 2), **gains}


def _lamp(request: Request) -> Scores:
    squares = request.reduced(magnitudes(request.graph, request.groups, 2))
    return {dim: lamp(own.reshape(-1)).reshape(own.shape) for dim, own in squares.items()}


def _with_l2(request: Request, members: MemberScores, without: str) -> Scores:
    """Scores, and l2 of Dims of which the score says nothing; both are normalised within the Dim."""
    missing = [group for group in request.groups if not members.get(group.dim)]
    if missing:
        request.notes.append(f"{len(missing)} of {len(request.groups)} Dims {without} and are scored by l2")
    norms = _norms(request, 2) if missing else {}
    return {**request.reduced(members), **{group.dim: norms[group.dim] for group in missing}}


SCORES: Mapping[str, Criterion] = {
    "distortion": Criterion(
        lambda r: distortion_scores(r.graph, r.groups, r.inputs, r.seed, r.counts),
        "data", "change of the outputs that is left when the layers behind make up for it", "none",
    ),
    "l1": Criterion(lambda r: _norms(r, 1), "nothing", "sum of |w|"),
    "l2": Criterion(lambda r: _norms(r, 2), "nothing", "norm of w"),
    "bn": Criterion(_batch_norm, "nothing", "gains of BatchNorms; l2 where there are none", apart=False),
    "fpgm": Criterion(
        lambda r: r.reduced(geometric_median(r.graph, r.groups)),
        "nothing", "distances to the slices of all others", apart=False,
    ),
    "lamp": Criterion(_lamp, "nothing", "w^2 as a share of what is at least as large", "none"),
    "random": Criterion(lambda r: chance(r.groups, r.seed), "nothing", "chance", "none"),
    "activation": Criterion(
        lambda r: _with_l2(r, activation(r.graph, r.groups, r.inputs), "are not seen in values"),
        "data", "mean of |a| where the Dim is made", apart=False,
    ),
    "activation-norm": Criterion(
        lambda r: _with_l2(r, activation_norm(r.graph, r.groups, r.inputs), "are not seen in values"),
        "data", "norm over examples of the means of |a| (Minitron)", apart=False,
    ),
    "wanda": Criterion(
        lambda r: _with_l2(r, wanda(r.graph, r.groups, r.inputs), "have no layer that contracts them"),
        "data", "w^2 times the mean square of the input, by columns", apart=False,
    ),
    "taylor": Criterion(lambda r: r.reduced(r.by_loss.taylor()), "loss", "|sum w g|"),
    "taylor-element": Criterion(lambda r: r.reduced(r.by_loss.taylor_element()), "loss", "sum |w g|"),
    "taylor-squared": Criterion(
        lambda r: r.reduced(r.by_loss.taylor_squared()), "loss", "(sum w g)^2, mean over examples", "none"
    ),
    "fisher": Criterion(
        lambda r: r.by_loss.fisher(), "loss", "(sum w g)^2 of all members together, mean over examples (NViT)", "none"
    ),
    "mask-gradient": Criterion(
        lambda r: r.by_loss.mask_gradient(),
        "loss", "squared gradient of a mask on the Dim, mean over examples", "none", apart=False,
    ),
    "obd": Criterion(lambda r: r.reduced(r.by_loss.obd()), "loss", "sum h w^2 / 2, h the Hessian's diagonal", "none"),
    "snip": Criterion(lambda r: r.reduced(r.by_loss.snip()), "loss", "share of |w g| on one batch", "none"),
    "grasp": Criterion(lambda r: r.reduced(r.by_loss.grasp()), "loss", "w (H g): keeps the gradient flow up", "none"),
    "crop": Criterion(lambda r: r.reduced(r.by_loss.crop()), "loss", "|w (H g)|: keeps the gradient flow", "none"),
    "hesso": Criterion(lambda r: r.by_loss.hesso(), "loss", "mean of five: norms, cosine and Taylor terms", "none"),
}  # fmt: skip


def criterion(name: str) -> Criterion:
    """The score of a name; raises PassError for one that there is not."""
    if name not in SCORES:
        close = get_close_matches(name, SCORES, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PassError(f"there is no score {name!r}: {hint}scores are {', '.join(SCORES)}")
    return SCORES[name]


def score(
    graph: Graph,
    groups: Sequence[Group],
    name: str,
    seed: int = 0,
    *,
    batches: Sequence[Labelled] = (),
    loss: Loss | None = None,
    reduce: Reduce | None = None,
    normalise: Normalise | None = None,
    notes: list[str] | None = None,
    counts: Counts | None = None,
) -> Scores:
    """One score per index of each group's Dim, higher is more important, finite; [*sizes of the majors, size] of a
    group with majors, where the score tells indices of these apart.

    ``reduce`` says how what the members of a Dim say becomes one score, where they say it one by one (sum by default);
    ``normalise`` what is done within each Dim. ``notes`` gets what a user should know. With ``counts``, how many
    indices each Dim keeps, scores need not say more than which these are. Raises PassError for an unknown name, and
    where batches are missing.
    """
    entry = criterion(name)
    if entry.needs != "nothing" and not batches:
        raise PassError(f"score={name} needs data: {GIVE_DATA}")
    told = groups if entry.apart else [replace(group, majors=()) for group in groups]
    request = Request(graph, told, batches, loss, reduce, seed, [] if notes is None else notes, counts)
    found = entry.compute(request)
    return {group.dim: normalised(found[group.dim], normalise or entry.normalise) for group in groups}
