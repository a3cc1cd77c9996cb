"""What every way of storing a matrix has in common: a format rounds a matrix to something stored, which writes itself.

A new format is a file with a pair of such classes, and a line in :mod:`regauge.passes.quantization.schemes`.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, Self, TypeAlias

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Parameter, Value
from regauge.passes.calibration.quadratic import Quadratic

Method: TypeAlias = Literal["nearest", "columns", "descent"]


class Stored(Protocol):
    """A matrix [rows, columns] as it is stored."""

    @property
    def values(self) -> torch.Tensor:
        """[rows, columns]: the numbers that it stands for, in double precision."""
        ...

    @property
    def bits(self) -> float:
        """Bits of all that is stored."""
        ...

    def write(self, to: Constants) -> Value:
        """What gives the matrix in a graph, [rows, columns] in single precision."""
        ...

    def product(self, to: Constants, x: Value) -> Value | None:
        """What gives the products of x [..., columns] with the rows, where that is less work without the matrix."""
        return None


class Coding(Stored, Protocol):
    """A matrix with a code for each entry, and numbers beside them that say what codes stand for."""

    codes: torch.Tensor

    @property
    def shared(self) -> bool:
        """Whether rows share numbers beside their codes: these are then better for all rows together, or not at all."""
        ...

    def nearest(self, wanted: torch.Tensor, column: int) -> torch.Tensor:
        """The codes [rows] of a column that come nearest to numbers [rows]."""
        ...

    def given(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        """The numbers [rows] that codes [rows] of a column stand for."""
        ...

    def with_codes(self, codes: torch.Tensor) -> Self: ...

    def refitted(self, problem: Quadratic) -> Self:
        """The same codes with the best numbers beside them, as far as those are free."""
        ...

    def with_rows(self, other: Self, rows: torch.Tensor) -> Self:
        """This one, with those rows of another that a mask [rows] says."""
        ...


class Format(Protocol):
    """How matrices are stored."""

    def rounded(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Stored:
        """The nearest that it can store, where the squared error of a column weighs its ``importance`` [columns]."""
        ...

    def fitted(self, problem: Quadratic, method: Method | None) -> Stored:
        """What changes least of what a layer gives on data; without a method the format's own."""
        ...


class Constants:
    """Adds what is stored of one weight to a graph, under names that begin with the weight's; each part once.

    ``zeros``: symmetric codes have zero points, too, except where floats are made of them ``at_load`` of a file.
    """

    def __init__(
        self, build: Builder, name: str, *, packed: bool = False, zeros: bool = False, at_load: bool = False
    ) -> None:
        self.build, self.name, self.packed, self.zeros, self.at_load = build, name, packed, zeros, at_load
        self._made: dict[str, Parameter] = {}

    def weight(self, suffix: str, data: torch.Tensor) -> Parameter:
        """A part of a trained weight, which is trained no more."""
        return self._once(suffix, data, kind="parameter", trainable=False)

    def buffer(self, suffix: str, data: torch.Tensor) -> Parameter:
        return self._once(suffix, data, kind="buffer")

    def _once(self, suffix: str, data: torch.Tensor, **fields: Any) -> Parameter:
        if suffix not in self._made:
            name = self.build.unique(f"{self.name}_{suffix}")
            self._made[suffix] = self.build.parameter(name, data.contiguous(), **fields)
        return self._made[suffix]

    def half(self, suffix: str, data: torch.Tensor) -> Value:
        """Numbers stored in half precision, as such of single precision."""
        found: Value = self.build.cast(self.weight(suffix, data.half()), dtype=torch.float32)
        return found

    def digits(self, digits: torch.Tensor, base: int) -> Value:
        """Numbers [..., n] from 0 to below ``base`` as bytes that each hold several of them along the last axis."""
        count, columns = digits_in_a_byte(base), int(digits.shape[-1])
        stored = self.weight("packed", packed_digits(digits, base))
        found: Value = self.build.unpack(stored, base=base, count=count)
        if columns % count:
            found = self.build.slice(found, dim=digits.dim() - 1, start=0, end=columns)
        return found

    def scaled(self, matrix: Value, scale: torch.Tensor) -> Value:
        """A matrix [rows, columns] times scales [rows, groups] of neighbouring columns."""
        rows, columns = (int(size) for size in matrix.shape)
        if scale.shape[1] == 1:
            by_row = self.weight("scale", scale[:, 0].float())
            found: Value = self.build.mul(matrix, self.build.unsqueeze(by_row, dim=1))
            return found
        groups, factor = scale.shape[1], self.weight("scale", scale.float())
        parts = self.build.reshape(matrix, shape=(rows, groups, columns // groups))
        found = self.build.mul(parts, self.build.unsqueeze(factor, dim=2))
        back: Value = self.build.reshape(found, shape=(rows, columns))
        return back


def digits_in_a_byte(base: int) -> int:
    """How many numbers below ``base`` a byte holds: 8 of 2, 5 of 3, 4 of 4, 2 of 16."""
    count = 1
    while base ** (count + 1) <= 256:
        count += 1
    return count


def packed_digits(digits: torch.Tensor, base: int) -> torch.Tensor:
    """Numbers [..., n] below ``base`` as bytes [..., n / count], the first of each byte the least significant."""
    count = digits_in_a_byte(base)
    missing = -digits.shape[-1] % count
    whole = torch.nn.functional.pad(digits.to(torch.int64), (0, missing))
    powers: torch.Tensor = base ** torch.arange(count)
    return (whole.reshape(*digits.shape[:-1], -1, count) * powers).sum(-1).to(torch.uint8)
