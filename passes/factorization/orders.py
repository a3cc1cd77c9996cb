"""Orders of hidden channels in which the blocks of structured forms are nearer to matrices of their rank.

    x W1'  ->  h  ->  h W2'         blocks of W2 are columns k i and k' i': which channels meet in one is free

A Dim that no operator tells apart (:mod:`regauge.ir.dims.reorder`) may be permuted with all weights that have it, and
nothing of it stays in the graph. Channels are shared out among the blocks as in K-subspaces (Bradley and Mangasarian
2000, k-plane clustering): in turns each block takes its best directions, and channels go where these leave least of
them, as many to each block (a linear assignment). Where there are no blocks, as in sums of Kronecker products and
matrix product operators, channels go in turns where the product of the best factors is nearest to them. It looks at the
weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.reorder import may_be_reordered, reorder
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer, matrices_of
from regauge.passes.factorization.networks import Network, Sizes, count
from regauge.passes.factorization.problems import Problem
from regauge.passes.factorization.splitting import split

_TURNS = 15
_GAIN = 1e-3  # of what the blocks leave, below which there is no other turn


def in_blocks(graph: Graph, found: Sequence[tuple[Layer, Network, Sizes]], *, by: str) -> tuple[Graph, list[Dim]]:
    """The graph with its Dims in the order that suits these layers, and the Dims that moved.

    A Dim that several layers have is ordered for that of them which gains most, as a share of its weight.
    """
    ends = [
        (leaves(graph.axes.of[layer.weight][axis]), layer, network, sizes, side)
        for layer, network, sizes in found
        for axis, side in ((layer.contracted, network.inputs), (layer.made, network.outputs))
    ]
    alone = {dims[0] for dims, *_ in ends if len(dims) == 1}
    free = set(may_be_reordered(graph, alone)) if alone else set()
    best: dict[Dim, tuple[float, np.ndarray]] = {}
    for dims, layer, network, sizes, side in ends:
        if len(dims) == 1 and dims[0] in free:
            gain, order = _order(network, layer, sizes, side)
            if gain > best.get(dims[0], (0.0, order))[0]:
                best[dims[0]] = gain, order
    orders = {dim: order for dim, (_, order) in best.items()}
    return (reorder(graph, orders, by=by) if orders else graph), list(orders)


def _order(network: Network, layer: Layer, sizes: Sizes, side: str) -> tuple[float, np.ndarray]:
    """The order of the channels of a side, and what share of the weight is left less."""
    weight = matrices_of(layer)[0]
    nothing = 0.0, np.arange(count(side, sizes))
    if not network.bonds:
        return nothing
    batch, own, others = network.unfoldings()[0]
    blocks = "".join(axis for axis in batch if axis in side)
    within = own if side == network.inputs else others
    if not batch:
        return _matched(network, Problem(layer, weight), sizes, side)
    if not blocks or any(axis not in side for axis in within):
        return nothing
    contexts = "".join(axis for axis in batch if axis not in side)
    across = others if side == network.inputs else own
    given = network.outputs + network.inputs
    grid = weight.reshape([sizes[axis] for axis in given])
    vectors = torch.einsum(f"{given}->{side}{contexts}{across}", grid)
    vectors = vectors.reshape(count(side, sizes), count(contexts, sizes), count(across, sizes))
    places = torch.arange(len(vectors)).reshape([sizes[axis] for axis in side])
    slots = torch.einsum(f"{side}->{blocks}{within}", places).reshape(count(blocks, sizes), -1)
    left, members = _shared_out(vectors, slots, sizes[network.bonds[0]])
    order = torch.empty(len(vectors), dtype=torch.long)
    order[slots] = members
    return (left[0] - left[1]) / max(float(weight.square().sum()), 1e-300), order.numpy()


def _shared_out(vectors: torch.Tensor, members: torch.Tensor, rank: int) -> tuple[tuple[float, float], torch.Tensor]:
    """Which vectors [channels, contexts, length] meet in each block [blocks, members]; what they leave of themselves
    beside the best directions of their block in each context, at first and in the end."""
    from scipy.optimize import linear_sum_assignment

    whole = vectors.square().sum((1, 2))
    kept: tuple[float, torch.Tensor] | None = None
    first = 0.0
    for _ in range(_TURNS):
        matrices = vectors[members].transpose(1, 2)  # blocks, contexts, members, length
        directions = torch.linalg.svd(matrices, full_matrices=False).Vh[..., :rank, :]
        inside = torch.einsum("ncl,bcrl->nbcr", vectors, directions).square().sum((2, 3))
        block = torch.arange(len(members))[:, None].expand_as(members)
        left = float((whole[members] - inside[members, block]).sum())
        if kept is None:
            first = left
        elif left > (1 - _GAIN) * kept[0]:
            break
        kept = left, members
        cost = (whole[:, None] - inside).repeat_interleave(members.shape[1], 1)
        _, taken = linear_sum_assignment(cost.numpy())
        members = torch.from_numpy(np.argsort(taken, kind="stable")).reshape(members.shape)
    assert kept is not None
    return (first, kept[0]), kept[1]


def _matched(network: Network, problem: Problem, sizes: Sizes, side: str) -> tuple[float, np.ndarray]:
    """Where there are no blocks: in turns the best factors, and channels where the product is nearest to them."""
    from scipy.optimize import linear_sum_assignment

    weight = problem.weight if side == network.outputs else problem.weight.t()
    order, first, kept = np.arange(len(weight)), 0.0, float("inf")
    best = order
    for turn in range(_TURNS):
        own = weight[order] if side == network.outputs else weight[order].t()
        image = network.image(split(network, replace(problem, weight=own), sizes), sizes)
        left = float((own - image).square().sum())
        first = left if turn == 0 else first
        if left > (1 - _GAIN) * kept:
            break
        kept, best = left, order
        image = image if side == network.outputs else image.t()
        cost = image.square().sum(1) - 2 * weight @ image.t()  # of each channel at each place, but for its own size
        order = np.argsort(linear_sum_assignment(cost.numpy())[1], kind="stable")
    return (first - kept) / max(float(weight.square().sum()), 1e-300), best
