"""Weights whose rows are their own mirror images, or the negatives of these: half of each is stored.

w[r, n] = sign[r] * w[r, length - 1 - n]        a filter of linear phase; or its first place apart:
w[r, n] = sign[r] * w[r, length - n], n > 0     a filter of one period, as in a Fourier basis under a periodic window

Filters are designed to be so (Oppenheim and Schafer, Discrete-Time Signal Processing, section 5.7.3); what is
trained hardly ever is. The places are those of the last axis that is summed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regauge.ir.graph import Value
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.quantization.formats import Constants, Method, Stored
from regauge.passes.quantization.levels import ENOUGH, Leveled, Levels

_ALIKE = 1e-6
"""Of the greatest entry: how far mirror images may be apart, single precision's rounding."""
_LEAST = 8  # places


@dataclass(frozen=True)
class Mirrored:
    """A table for the places that stay, ``apart`` of which, 0 or 1, have no mirror image in front; ``signs`` [rows]."""

    form: Levels
    length: int
    apart: int
    signs: torch.Tensor

    @property
    def kept(self) -> int:
        """Places that stay: the others are mirror images of those from ``apart`` on."""
        return (self.length + 1 + self.apart) // 2

    def rounded(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Unfolded:
        """``weight`` [rows, columns], the places innermost; ``importance`` [columns]."""
        weighs = None if importance is None else self._folded(importance[None], torch.ones(1))[0]
        counts = self._folded(torch.ones_like(weight[:1]), torch.ones(1))
        return Unfolded(self, self.form.rounded(self._folded(weight, self.signs) / counts, weighs))

    def fitted(self, problem: Quadratic, method: Method | None) -> Unfolded:
        """The nearest: an error at a place comes with one at its mirror image, which columns alone do not know of."""
        return self.rounded(problem.optimum, problem.hessian.diag())

    def _folded(self, weight: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        """The sums of places and their mirror images."""
        parts = weight.double().reshape(len(weight), -1, self.length)
        found = parts[..., : self.kept].clone()
        images = (parts * signs.double()[:, None, None])[..., self.kept :].flip(-1)
        found[..., self.apart : self.apart + images.shape[-1]] += images
        return found.flatten(1)


@dataclass
class Unfolded(Stored):
    """What is stored of the places that stay."""

    form: Mirrored
    half: Leveled

    @property
    def values(self) -> torch.Tensor:
        form = self.form
        parts = self.half.values.reshape(len(form.signs), -1, form.kept)
        images = parts[..., form.apart : form.apart + form.length - form.kept].flip(-1)
        return torch.cat([parts, images * form.signs.double()[:, None, None]], -1).flatten(1)

    @property
    def bits(self) -> float:
        return self.half.bits + 8 * len(self.form.signs)

    def write(self, to: Constants) -> Value:
        rows, columns = self.values.shape
        return self.laid_out(to, (rows, columns), 0)

    def laid_out(self, to: Constants, shape: tuple[int, ...], axis: int) -> Value:
        """The weight in the shape in which a layer has it, whose ``axis`` has the rows."""
        form, along = self.form, places_of(shape, axis)
        half = self.half.laid_out(to, tuple(form.kept if at == along else n for at, n in enumerate(shape)), axis)
        end = form.apart + form.length - form.kept
        images: Value = to.build.flip(to.build.slice(half, dim=along, start=form.apart, end=end), dims=(along,))
        if bool((form.signs < 0).any()):
            beside = [-1 if at == axis else 1 for at in range(len(shape))]
            signs = to.weight("signs", form.signs.to(torch.int8).reshape(beside))
            images = to.build.mul(images, to.build.cast(signs, dtype=torch.float32))
        found: Value = to.build.concat(half, images, dim=along)
        return found


def places_of(shape: Sequence[int], axis: int) -> int:
    """The last axis but that of the rows."""
    return max(at for at in range(len(shape)) if at != axis)


def table_of(weight: torch.Tensor, shape: Sequence[int], axis: int) -> Levels | Mirrored:
    """A table for a weight [rows, columns] of many entries, which a layer has in a shape whose ``axis`` has the rows;
    for half of it, if that is as many and the rest are their mirror images."""
    form, length = Levels(), int(shape[places_of(shape, axis)])
    halved = mirrored(weight, length, form) if weight.numel() >= 2 * ENOUGH else None
    return form if halved is None else halved


def mirrored(weight: torch.Tensor, length: int, form: Levels) -> Mirrored | None:
    """The form that stores half of a weight [rows, columns] with ``length`` places innermost, if its rows are so."""
    if length < _LEAST:
        return None
    parts = weight.double().reshape(len(weight), -1, length)
    limit = _ALIKE * parts.abs().max()
    for apart in (0, 1):
        inner = parts[..., apart:]
        even, odd = ((inner - sign * inner.flip(-1)).abs().amax((1, 2)) <= limit for sign in (1, -1))
        if bool((even | odd).all()):
            return Mirrored(form, length, apart, torch.where(even, 1.0, -1.0))
    return None
