"""Orthogonal matrices that spread outliers: Hadamard matrices of many orders, random ones, and how they are applied.

Orders 2^k m with m = 1 or that of a construction of Paley (1933): q + 1 for a prime q = 3 mod 4, and 2 (q + 1) for a
prime q = 1 mod 4, as 12, 20, 28, 36, 44, 60. Of another order the matrix is the Kronecker product of the largest such
factor and a random orthogonal one: entries are of one size within blocks only.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import torch

Kind: TypeAlias = Literal["hadamard", "random"]


def rotation(kind: Kind, size: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal matrix [size, size] in double precision.

    ``hadamard`` has random signs on one side (Ashkboos et al. 2024, QuaRot); ``random`` is drawn evenly of all.
    """
    if kind == "random":
        return random_orthogonal(size, generator)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return spread(size, generator) * signs


def random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    found: torch.Tensor = q * torch.sign(r.diagonal())  # else it would not be drawn evenly
    return found


def spread(size: int, generator: torch.Generator) -> torch.Tensor:
    """A Hadamard matrix divided by the root of its order, or the nearest thing where there is none of this size."""
    part = next(order for order in range(size, 0, -1) if size % order == 0 and signs_of(order) is not None)
    known = signs_of(part)
    assert known is not None
    found = torch.from_numpy(known).double() / part**0.5
    rest = size // part
    return found if rest == 1 else torch.kron(found, random_orthogonal(rest, generator).contiguous())


@cache
def signs_of(order: int) -> np.ndarray | None:
    """A Hadamard matrix [order, order] of ones and minus ones; None where these constructions give none."""
    if order in (1, 2):
        return np.array([[1.0]]) if order == 1 else np.array([[1.0, 1.0], [1.0, -1.0]])
    if order % 4:
        return None
    for found in (_paley_one(order), _paley_two(order)):
        if found is not None:
            return found
    half = signs_of(order // 2)
    return None if half is None else np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)


def _paley_one(order: int) -> np.ndarray | None:
    q = order - 1
    if not _prime(q) or q % 4 != 3:
        return None
    skew = np.zeros((order, order))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _residues(q)
    return skew + np.eye(order)


def _paley_two(order: int) -> np.ndarray | None:
    q = order // 2 - 1
    if order % 4 or not _prime(q) or q % 4 != 1:
        return None
    even = np.zeros((q + 1, q + 1))
    even[0, 1:] = even[1:, 0] = 1
    even[1:, 1:] = _residues(q)
    return np.kron(even, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])


def _residues(q: int) -> np.ndarray:
    """Entry i, j: 1 where i - j is a square modulo q, -1 where it is none, 0 on the diagonal."""
    squares = {x * x % q for x in range(1, q)}
    character = np.array([0] + [1 if x in squares else -1 for x in range(1, q)])
    found: np.ndarray = character[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q]
    return found


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def two_factors(size: int) -> tuple[int, int]:
    """a b = size, near to each other: a rotation that is a Kronecker product costs a + b products an entry, not a b.

    Both are orders of Hadamard matrices where that costs no more than twice as much; (1, size) for a prime.
    """
    pairs = [(a, size // a) for a in range(1, int(size**0.5) + 1) if size % a == 0]
    known = [pair for pair in pairs if all(signs_of(order) is not None for order in pair)]
    return known[-1] if known and sum(known[-1]) <= 2 * sum(pairs[-1]) else pairs[-1]
