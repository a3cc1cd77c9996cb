"""Weights with zeros made ready for kernels: what is stored are the other entries, and a bit for each place.

    linear(x, w[n, k])     ->     linear(x, n_of_m(values[n, 2, k / 4], mask[n, k / 4]))      of w that is 2:4
    linear(x, w[n, k])     ->     linear(x, bitmap(values[v], mask[n, k / 32], starts[n, k / 32]))      of any other

A kernel reads what is stored and multiplies dense tiles of it, made in registers: fewer bytes are read, and no less is
multiplied (load sparse, compute dense: Xia et al. 2023, Flash-LLM, section 4). Where the zeros lie are bits, not that
paper's lists of positions in a tile: those of NVIDIA's own sparse tiles, or a bitmap (Fan et al. 2025, SpInfer, section
4.2, whose tiles of 8 by 8 are here 32 neighbours of a row, with the place where their entries begin). So it gains where
reading weights takes the time, with few rows. Of a row of n of m the first groups lie in the lower bits of its bytes
and the last ones in the upper ones, as :mod:`kernel_weights` lays codes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch

from regauge.backends.torch_module.packing import pack
from regauge.ir.edit import Builder, remove_dead, replace_uses
from regauge.ir.fusion.legality import FLOATS
from regauge.ir.fusion.products import SHORTEST
from regauge.ir.fusion.prologues import MOST_ROWS
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.sizes.expressions import is_static

GROUPS = (2, 4, 8)
"""Neighbours of which so many are kept: their bits fill bytes."""

WORD = 32
"""Neighbours of a bitmap that share a word, and the place where their entries begin."""

MOST_KEPT = 4
"""Entries of a group, among which a kernel chooses for each place."""

WORTH = 0.75
"""What a stored weight may take of the bytes of the dense one."""


def pack_zeros(graph: Graph) -> dict[Value, Parameter]:
    """Let weights of linear maps that have enough zeros among any neighbours, and that few rows meet, be computed from
    what is stored of them, on a graph that the caller owns; the dense weights by what stands for them."""
    build = Builder(graph, by="kernels")
    found: dict[Value, Parameter] = {}
    for node, weight, turned in list(_weights(graph)):
        with build.at(node):
            stands = _packed(build, weight, turned)
        if stands is not None:
            replace_uses(graph, weight, stands)
            found[stands] = weight
    return found


def leave_dense(graph: Graph, packed: Mapping[Value, Parameter], inside: Collection[Node]) -> None:
    """Read the dense weights again where what stands for them is not computed ``inside`` of kernels."""
    for value, weight in packed.items():
        if value.producer not in inside:
            replace_uses(graph, value, weight)
    if packed:
        remove_dead(graph)


def _weights(graph: Graph) -> Iterator[tuple[Node, Parameter, bool]]:
    """The weights that one linear map reads and that few rows meet, and whether they are stored [inputs, outputs]."""
    for node in graph.nodes:
        if node.op not in ("linear", "matmul"):
            continue
        x, weight = node.inputs[:2]
        if not isinstance(weight, Parameter) or weight.rank != 2 or len(weight.uses) > 1 or weight.dtype not in FLOATS:
            continue
        assert isinstance(x, Value)
        rows = [size for size in x.shape[:-1] if is_static(size)]
        if math.prod(map(int, rows)) <= MOST_ROWS:
            yield node, weight, node.op == "matmul"


def n_of_m_of(weight: torch.Tensor) -> tuple[int, int] | None:
    """How many entries of how many neighbours along the inputs of a weight [outputs, inputs] are not zero at most,
    where that is stored in fewest bytes; None where it is not worth it."""
    size, inputs = weight.element_size(), weight.shape[1]
    best, least = None, min(WORTH * size, _bytes_of_bitmap(weight))
    there = weight != 0
    for of in GROUPS:
        if inputs % of or inputs // 8 < SHORTEST or not weight.numel():
            continue
        keep = max(1, int(there.reshape(-1, of).sum(1).max()))
        each = keep / of * size + (1 / 8 if inputs // of % (8 // of) == 0 else 1 / of)
        if keep <= MOST_KEPT and each < least:
            best, least = (keep, of), each
    return best


def is_bitmap(weight: torch.Tensor) -> bool:
    """Whether a bitmap of a weight [outputs, inputs] is worth it."""
    return _bytes_of_bitmap(weight) < WORTH * weight.element_size()


def _bytes_of_bitmap(weight: torch.Tensor) -> float:
    """Bytes of each entry of a weight; infinity where it has no bitmap, as one of zeros alone."""
    count = int(torch.count_nonzero(weight))
    if not 0 < count < 2**31 or weight.shape[1] % WORD:
        return math.inf
    return count / weight.numel() * weight.element_size() + 2 * 4 / WORD


def stored(weight: torch.Tensor, keep: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries of a weight [outputs, inputs] that are not zero, [outputs, keep, groups], and the bits of their
    places, [outputs, bytes]."""
    outputs, groups = weight.shape[0], weight.shape[1] // of
    entries = weight.reshape(outputs, groups, of)
    there = (entries != 0).to(torch.uint8)
    order = there.argsort(dim=2, descending=True, stable=True)[:, :, :keep]  # those that are there first, as they stand
    values = entries.gather(2, order).transpose(1, 2).contiguous()
    bits = (there << torch.arange(of, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    share = _share(groups, of)
    if share == 1:
        return values, bits
    return values, pack(bits.reshape(outputs, share, groups // share).transpose(1, 2).reshape(outputs, groups), of)


def _share(groups: int, of: int) -> int:
    """How many groups share a byte."""
    return 8 // of if groups % (8 // of) == 0 else 1


def dense_of(build: Builder, values: Value, mask: Value, keep: int, of: int) -> Value:
    """The weight [outputs, inputs] of which :func:`stored` gives these."""
    outputs, groups = values.shape[0], int(values.shape[2])
    share = _share(groups, of)
    if share > 1:
        mask = build.reshape(build.unpack(mask, base=2**of, count=share), shape=(outputs, groups // share, share))
        mask = build.reshape(build.permute(mask, dims=(0, 2, 1)), shape=(outputs, groups))
    found: Value = build.n_of_m(values, mask, keep=keep, of=of)
    return found


def stored_bitmap(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries of a weight [outputs, inputs] that are not zero, row by row, [entries]; the bits of their places, and
    how many entries lie before each word of these, [outputs, words] both."""
    there = (weight != 0).reshape(weight.shape[0], -1, WORD)
    values = weight.reshape(there.shape)[there]
    bits = (there.to(torch.int64) << torch.arange(WORD)).sum(2)
    counts = there.sum(2).flatten()
    starts = (counts.cumsum(0) - counts).reshape(bits.shape)
    if len(values) < 2:  # an axis of one entry would have no index
        values = torch.cat([values, weight.new_zeros(2 - len(values))])
    return values, bits.to(torch.int32), starts.to(torch.int32)


def _packed(build: Builder, weight: Parameter, turned: bool) -> Value | None:
    """What stands for a weight; None where it is best as it is."""
    tensor = weight.tensor.detach()
    tensor = tensor.t() if turned else tensor
    pattern = n_of_m_of(tensor)
    if pattern is None and not is_bitmap(tensor):
        return None
    values, mask, *starts = stored_bitmap(tensor) if pattern is None else stored(tensor, *pattern)
    read = build.parameter(build.unique(f"{weight.name}_values"), values, trainable=weight.trainable)
    bits = build.parameter(build.unique(f"{weight.name}_mask"), mask, "buffer")
    if pattern is None:
        begins = build.parameter(build.unique(f"{weight.name}_starts"), starts[0], "buffer")
        found: Value = build.bitmap(read, bits, begins, of=WORD)
    else:
        found = dense_of(build, read, bits, *pattern)
    return build.permute(found, dims=(1, 0)) if turned else found
