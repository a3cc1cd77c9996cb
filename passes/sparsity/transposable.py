"""Masks that are N:M along rows and along columns, so that the backward pass, or a transposed use, has the pattern too.

Every M x M block is a matter of its own: choose entries of a high sum, at most N in each row and column (Hubara et al.
2021, Accelerated Sparse Neural Training, section 4). For M = 4 all 90 masks of 2:4 (24 of 1:4 and of 3:4) are tried,
so the choice is the best one. For greater M entries are taken in falling order where row and column have room, which
is at least half of the best sum (their section 4.2); what that leaves unfilled is filled, and entries change places in
pairs while the sum rises.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch

_MOST_ENUMERATED = 4  # the greatest M whose masks are all tried
_ENTRIES = 1 << 22  # numbers that are held at a time


def transposable_mask(costs: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """Which entries of ``costs`` [rows, columns], none of them negative, are kept; sizes are multiples of ``of``."""
    blocks = costs.reshape(len(costs) // of, of, -1, of).transpose(1, 2)
    flat = blocks.reshape(-1, of, of)
    choose = _best if of <= _MOST_ENUMERATED else _greedy
    kept = torch.cat([choose(part, keep) for part in torch.split(flat, max(1, _ENTRIES // of**4))])
    return kept.reshape(blocks.shape).transpose(1, 2).reshape(costs.shape)


def _best(blocks: torch.Tensor, keep: int) -> torch.Tensor:
    size = blocks.shape[1]
    masks = _all_masks(keep, size)
    sums = blocks.reshape(len(blocks), -1) @ masks.reshape(len(masks), -1).t().to(blocks.dtype)
    return masks[sums.argmax(1)]


@lru_cache
def _all_masks(keep: int, of: int) -> torch.Tensor:
    """Every mask with exactly ``keep`` in each row and column, [masks, of, of]."""
    rows = [[int(i in kept) for i in range(of)] for kept in itertools.combinations(range(of), keep)]
    found = [
        m for m in itertools.product(rows, repeat=of) if all(sum(column) == keep for column in zip(*m, strict=True))
    ]
    return torch.tensor(found).bool()


def _greedy(blocks: torch.Tensor, keep: int) -> torch.Tensor:
    """All blocks side by side: the next entry of each is taken where its row and column have room."""
    count, size = blocks.shape[:2]
    order = blocks.reshape(count, -1).argsort(1, descending=True)
    kept = torch.zeros(count, size * size, dtype=torch.bool)
    in_row, in_column = torch.zeros(count, size, dtype=torch.int64), torch.zeros(count, size, dtype=torch.int64)
    every = torch.arange(count)
    for entry in order.t():
        row, column = entry // size, entry % size
        room = (in_row[every, row] < keep) & (in_column[every, column] < keep)
        kept[every, entry] = room
        in_row[every, row] += room
        in_column[every, column] += room
    return _exchanged(blocks, _filled(blocks, kept.reshape(count, size, size), keep))


def _filled(blocks: torch.Tensor, kept: torch.Tensor, keep: int) -> torch.Tensor:
    """Row r and column d that have room, though not for (r, d): (r, c) and (s, d) come where (s, c) goes."""
    count, size = blocks.shape[:2]
    for _ in range(size * keep):
        row, column = kept.sum(2) < keep, kept.sum(1) < keep
        comes = torch.where(kept, -torch.inf, blocks)
        goes = torch.where(kept, blocks, torch.inf)
        first = comes + torch.where(row, 0, -torch.inf)[:, :, None]  # (r, c)
        second = comes + torch.where(column, 0, -torch.inf)[:, None, :]  # (s, d)
        gain = first[:, :, :, None, None] + second[:, None, None, :, :]  # [blocks, r, c, s, d]
        gain = (gain - goes.transpose(1, 2)[:, None, :, :, None]).reshape(count, -1)
        best, place = gain.max(1)
        open_blocks = best.isfinite().nonzero()[:, 0]
        if not len(open_blocks):
            break
        r, c, s, d = torch.unravel_index(place[open_blocks], (size, size, size, size))
        kept[open_blocks, s, c] = False
        kept[open_blocks, r, c] = kept[open_blocks, s, d] = True
    return kept


def _exchanged(blocks: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Two kept entries (r, c), (s, d) give way to (r, d), (s, c) where these sum to more, which keeps all counts.

    The best such pair of each block, until there is none.
    """
    count, size = blocks.shape[:2]
    for _ in range(size * size):
        value = torch.where(kept, blocks, -torch.inf)  # what (r, c) gives when it is kept
        other = torch.where(kept, -torch.inf, blocks)
        gain = other[:, :, None, None, :] + other.transpose(1, 2)[:, None, :, :, None]  # [blocks, r, c, s, d]
        gain = gain - (value[:, :, :, None, None] + value[:, None, None, :, :])
        gain = torch.where(gain.isfinite(), gain, -torch.inf).reshape(count, -1)
        best, place = gain.max(1)
        better = (best > 1e-12 * blocks.reshape(count, -1).amax(1)).nonzero()[:, 0]
        if not len(better):
            break
        r, c, s, d = torch.unravel_index(place[better], (size, size, size, size))
        kept[better, r, c] = kept[better, s, d] = False
        kept[better, r, d] = kept[better, s, c] = True
    return kept
