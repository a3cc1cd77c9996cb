"""Layers as factors whose ranks training is to find."""

from __future__ import annotations

from collections import Counter

from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.factorization.blocks import links_of
from regauge.passes.factorization.chains import write_chain
from regauge.passes.factorization.forms import LowRank
from regauge.passes.factorization.problems import plain_problems

NAME = "full-rank-factors"


def full_rank_factors(
    graph: Graph, *, share: float = 1.0, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> Graph:
    """A graph that computes the same, in which layers are two, with as many directions between as their rank may be.

    It has more parameters: emit it, ``to_torch()``, and train ranks in it that are worth it. ``include`` and
    ``exclude`` are globs on names of weights; ``share`` below 1 keeps only the first singular directions (no longer the
    same function). Raises PassError for a share that is none.
    """
    if not 0 < share <= 1:
        raise PassError(f"full_rank_factors: share={share:g} is to be above 0 and at most 1")
    form, result = LowRank(), graph.copy()
    for layer in chosen_layers(result, include, exclude, Counter(), form.misfit):
        rank = max(1, round(share * min(layer.outputs, layer.columns)))
        links, _ = links_of(form, plain_problems(layer), (rank,))
        write_chain(result, layer, links, by=NAME)
    remove_dead(result)
    return result
