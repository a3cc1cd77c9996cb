"""Maps of a Dim's index space, drawn from a gauge class and applied to tensors whose axes are laid out from Dims."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from regauge.ir.dims.extents import Dim, Extent, Product, leaves, resolve, size_of
from regauge.ir.gauge.classes import Gauge
from regauge.ir.graph import Parameter

if TYPE_CHECKING:
    from regauge.ir.laws.cases import Case

Assignment = dict[int, torch.Tensor]


def strongest(gauge: Gauge) -> str | None:
    """The kind of map that shows all that a gauge class claims beyond permutations; None where it claims no more."""
    if Gauge.GENERAL in gauge:
        return "general linear"
    if Gauge.ORTHOGONAL in gauge:
        return "orthogonal"
    words = {Gauge.SIGN | Gauge.SCALE: "signed scale", Gauge.SIGN: "sign", Gauge.SCALE: "positive scale"}
    return words.get(gauge & (Gauge.SIGN | Gauge.SCALE))


def draw_map(kind: str, size: int) -> torch.Tensor:
    """A well-conditioned matrix of the kind."""
    generator = torch.Generator().manual_seed(size)
    noise = torch.rand(size, size, generator=generator, dtype=torch.float64) - 0.5
    sign = torch.where(torch.arange(size) % 2 == 0, -1.0, 1.0).double()
    scale = 0.5 + 1.5 * torch.rand(size, generator=generator, dtype=torch.float64)
    match kind:
        case "general linear":
            return torch.diag(sign * scale) + noise / size
        case "orthogonal":
            rotation: torch.Tensor = torch.linalg.qr(noise)[0]
            return rotation
        case "sign":
            return torch.diag(sign)
        case "positive scale":
            return torch.diag(scale)
        case _:
            return torch.diag(sign * scale)


def mapped(tensor: torch.Tensor, axes: Sequence[Extent], dim: Dim, change: torch.Tensor) -> torch.Tensor:
    """The tensor with ``change`` applied to every axis that has the Dim; one of whole numbers stays as it is."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    for axis, extent in enumerate(axes):
        if dim in leaves(extent):
            matrix = _on_axis(extent, dim, change).to(tensor.dtype)
            tensor = torch.tensordot(matrix, tensor, ([1], [axis])).movedim(0, axis)
    return tensor


def _on_axis(extent: Extent, dim: Dim, change: torch.Tensor) -> torch.Tensor:
    found = resolve(extent)
    if found is dim:
        return change
    if isinstance(found, Dim) or dim not in leaves(found):
        return torch.eye(int(size_of(found)), dtype=change.dtype)
    if isinstance(found, Product):
        result = torch.ones(1, 1, dtype=change.dtype)
        for factor in found.factors:
            result = torch.kron(result, _on_axis(factor, dim, change))
        return result
    blocks: torch.Tensor = torch.block_diag(*(_on_axis(s, dim, change) for s in found.segments))  # type: ignore[no-untyped-call]
    return blocks


def assignments(case: Case, dim: Dim, change: torch.Tensor, *, in_result: bool) -> Iterator[Assignment]:
    """Which operand takes which map, as :mod:`regauge.ir.gauge.classes` says; the likeliest first."""
    slots = case.movable(dim)
    if "contract" in case.roles(dim) and not in_result:
        yield {slot: change if slot == slots[0] else torch.linalg.inv(change).T for slot in slots}
        return
    # An operand that is computed takes the map; a weight takes it or stays.
    choices = [[True, False] if isinstance(case.node.inputs[slot], Parameter) else [True] for slot in slots]
    for taken in itertools.product(*choices):
        if any(taken):
            yield {slot: change for slot, takes in zip(slots, taken, strict=True) if takes}
