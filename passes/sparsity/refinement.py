"""Bettering a mask without solving for weights: dynamic sparse no training, by the means and variances of inputs alone.

Zhang et al. 2024, DSnoT, sections 3.1-3.3. For each row, eps = sum over removed entries of W_j E[x_j] is what the mean
of the output lost. In every round the removed entry comes back that takes most from eps for its variance,

    j = argmax  sign(eps) W_j E[x_j] / Var[x_j]

and of the kept ones whose removal lowers |eps| too, that of the least |W_k| |x_k| (Wanda) goes. A row stops when |eps|
no longer falls, at ``LEAST`` of its output's scale, or after ``ROUNDS``. Where masks have groups, both lie in one.

Where means are small beside deviations, as behind a LayerNorm, this trades variance for nothing: 2:4 masks get worse
(docs/benchmarks.md). The paper's threshold 0.1 is in units of its models' activations; here it is relative.
"""

from __future__ import annotations

import torch

ROUNDS = 50
LEAST = 1e-3  # |eps| as a share of the root mean square of the row's output


def swap_by_means(
    weight: torch.Tensor, kept: torch.Tensor, mean: torch.Tensor, second: torch.Tensor, group: int
) -> torch.Tensor:
    """The bettered mask [outputs, columns]; ``mean`` and ``second`` [columns] are E[x] and E[x^2].

    Counts per row, and per ``group`` neighbours, stay.
    """
    kept = kept.clone()
    parts = weight * mean
    variance = (second - mean.square()).clamp(min=1e-12 * float(second.mean()) + 1e-30)
    wanda = weight.abs() * second.sqrt()
    scale = wanda.square().sum(1).sqrt()
    lost = (parts * ~kept).sum(1)
    active = (lost.abs() > LEAST * scale).nonzero()[:, 0]
    for _ in range(ROUNDS):
        if not len(active):
            break
        sign = lost[active].sign()[:, None]
        here = kept[active]
        may_go = here & (sign * parts[active] < 0)
        has_partner = _any_in_group(may_go, group)
        growth = torch.where(~here & has_partner, sign * parts[active] / variance, -torch.inf)
        gain, comes = growth.max(1)
        same = (torch.arange(weight.shape[1]) // group)[None, :] == (comes // group)[:, None]
        price, goes = torch.where(may_go & same, wanda[active], torch.inf).min(1)
        every = torch.arange(len(active))
        new = lost[active] - parts[active][every, comes] + parts[active][every, goes]
        better = (gain > 0) & price.isfinite() & (new.abs() < lost[active].abs())
        active, comes, goes, new = active[better], comes[better], goes[better], new[better]
        kept[active, comes] = True
        kept[active, goes] = False
        lost[active] = new
        active = active[new.abs() > LEAST * scale[active]]
    return kept


def _any_in_group(mask: torch.Tensor, group: int) -> torch.Tensor:
    return mask.reshape(len(mask), -1, group).any(2).repeat_interleave(group, 1)
