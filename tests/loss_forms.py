"""Losses as forms of kernels; see kernel_forms.py."""

from typing import Any

import torch


def cross_entropy(f: Any, rows: Any, columns: int) -> Any:
    """Of logits that are scaled; the label 3 is ignored."""
    b, x = f.build, f.x(2, rows, columns)
    return b.cross_entropy(b.mul(x, 3.0), f.x(2, rows, dtype=torch.int64), ignore_index=3)


def smooth_cross_entropy(f: Any, rows: Any, columns: int) -> Any:
    """A part of the loss is that of any label."""
    b, x, target = f.build, f.x(rows, columns), f.x(rows, dtype=torch.int64)
    spread = b.sub(b.logsumexp(x, dims=(1,)), b.mean(x, dims=(1,)))
    spread = b.where(b.ne(target, 3), spread, 0.0)
    return b.add(b.mul(b.cross_entropy(x, target, ignore_index=3), 0.9), b.mul(spread, 0.1))


def weighted_cross_entropy(f: Any, rows: Any, columns: int) -> Any:
    """Classes have weights; the losses are scaled."""
    b, target = f.build, f.x(rows, dtype=torch.int64)
    losses = b.cross_entropy(f.x(rows, columns), target, f.w(columns), ignore_index=3)
    return b.mul(losses, 0.5)
