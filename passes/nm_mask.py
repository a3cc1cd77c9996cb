"""N:M masks: of every M entries in a row at most N are kept (Mishra et al. 2021, Accelerating Sparse Deep Networks)."""

from __future__ import annotations

import torch


def nm_mask(values: torch.Tensor, axis: int, n: int, m: int) -> torch.Tensor:
    """A mask of the n largest of every m entries in a row along an axis, whose size is a multiple of m.

    Of equal entries the first stay. On the contracted axis that is what sparse tensor cores take; of a convolution that
    is the axis of input channels, place of the kernel by place.
    """
    blocks = values.movedim(axis, -1)
    shape = blocks.shape
    ranked = torch.argsort(blocks.reshape(-1, m), dim=1, descending=True, stable=True)
    mask = torch.zeros(ranked.shape, dtype=torch.bool, device=values.device)
    mask.scatter_(1, ranked[:, :n], True)
    return mask.reshape(shape).movedim(-1, axis)
