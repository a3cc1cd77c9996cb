"""BitStack: weights as stacks of terms, each of signs times magnitudes of low rank, of which any number may be loaded.

    r_0 = w S      t_k = sign(r_k) * (u_k v_k)      r_{k+1} = r_k - t_k      w ~ (t_0 + ... + t_{n-1}) S^-1

S are the norms of the inputs, u_k v_k is the best product of low rank for |r_k| (Wang et al. 2024, BitStack, sections
2.1 and 2.2). Here the rank follows the size of the weight unless it is said, so that magnitudes do not outweigh signs,
and S is stored in half precision in units of its mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regauge.ir.graph import Value
from regauge.passes.quantization.formats import Constants, Stored, packed_digits
from regauge.passes.quantization.signs import HALF_BITS, as_half, factors, signs

MOST_RANK = 16  # that of the paper, which has weights of 4096 columns
_SHARE = 2  # magnitudes may take half of what signs take
_LEAST_NORM = 1e-3  # of an input, as a share of the mean one: inputs that are always 0 have some, too


@dataclass
class Terms(Stored):
    """``signs`` [terms, rows, columns], ``u`` [terms, rows, rank], ``v`` [terms, rank, columns]; ``norms`` [columns]
    of inputs, by which their sum is divided."""

    signs: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    norms: torch.Tensor

    def first(self, count: int) -> Terms:
        return Terms(self.signs[:count], self.u[:count], self.v[:count], self.norms)

    @property
    def count(self) -> int:
        return len(self.signs)

    @property
    def values(self) -> torch.Tensor:
        terms = (sign * (u @ v) for sign, u, v in zip(self.signs, self.u, self.v, strict=True))
        return sum(terms, torch.zeros(())) / self.norms

    @property
    def bits(self) -> float:
        return 8 * (self.bytes_of_a_term * self.count + 2 * len(self.norms))

    @property
    def bytes_of_a_term(self) -> int:
        rows, columns = self.signs.shape[1:]
        return rows * (-(-columns // 8)) + (rows + columns) * self.u.shape[2] * HALF_BITS // 8

    def write(self, to: Constants) -> Value:
        count, rows, columns = self.signs.shape
        build = to.build
        found = build.reshape(signs(to, self.signs.reshape(-1, columns)), shape=(count, rows, columns))
        terms = build.mul(found, build.matmul(to.half("u", self.u), to.half("v", self.v)))
        whole: Value = build.div(build.sum(terms, dims=(0,)), to.half("norms", self.norms))
        return whole

    # -- in a file ---------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name: signs eight to a byte, all else in half precision."""
        parts = {"u": self.u, "v": self.v, "norms": self.norms}
        return {"signs": packed_digits(self.signs > 0, 2)} | {name: part.half() for name, part in parts.items()}

    @staticmethod
    def of_tensors(parts: dict[str, torch.Tensor]) -> Terms:
        u, v, norms = (parts[name].double() for name in ("u", "v", "norms"))
        bits = parts["signs"].unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)) & 1
        whole = bits.flatten(-2)[..., : v.shape[2]]
        return Terms(whole.to(torch.int8) * 2 - 1, u, v, norms)


def stacked(weight: torch.Tensor, norms: torch.Tensor, count: int, rank: int | None) -> Terms:
    """The first ``count`` terms of a weight [rows, columns] whose inputs have ``norms`` [columns]."""
    rows, columns = weight.shape
    rank = rank or max(1, min(MOST_RANK, rows * columns // (_SHARE * HALF_BITS * (rows + columns))))
    scale = as_half((norms / norms.mean().clamp(min=1e-300)).clamp(min=_LEAST_NORM))
    rest = weight.double() * scale
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for _ in range(count):
        u, v = (as_half(part) for part in factors(rest.abs(), rank))
        sign = torch.where(rest < 0, -1, 1).to(torch.int8)
        found.append((sign, u, v))
        rest = rest - sign * (u @ v)
    all_signs, us, vs = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Terms(all_signs, us, vs, scale)
