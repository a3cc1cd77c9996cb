"""Layouts in which weights with zeros are stored: each is a value, with all that is known of it in one class.

    dense    every entry
    masked   a bit for each entry, and those that are there
    coo      entries and their flat positions, as ONNX has them
    csr      entries by rows, with their columns
    RxC      blocks of R rows by C columns by rows of blocks (torch's bsr)
    N:M      N of every M neighbours in a row, and where they stood

What decides which entries go is another matter (``sparsify``), and so is what computes with the result: a layout only
says which tensor torch takes for it, where torch has a kernel (the split of STen: Ivanov et al. 2022, STen: Productive
and Efficient Sparsity in PyTorch, section 3). A layout of one's own derives from :class:`Layout`; with
:func:`register_layout` it is among those that :func:`smallest` tries and that have a name.

An entry is there where any of its bits is set, so that negative zeros come back as they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from regauge.ir.errors import RegaugeError

# Of 2:4: multiples that both of torch's backends, cuSPARSELt and CUTLASS, take (torch.sparse), and their types.
_ROWS, _COLUMNS = 32, 64
_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in a layout: its parts by name."""

    layout: Layout
    shape: tuple[int, ...]
    parts: Mapping[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def unpack(self) -> torch.Tensor:
        """The tensor that was packed."""
        return self.layout.unpack(self)


class Layout(ABC):
    """One way to store a tensor; two of them are equal where they store alike."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    def misfit(self, tensor: torch.Tensor) -> str | None:
        """The reason that a tensor cannot be stored in this layout; None where it can."""
        return None

    def pack(self, tensor: torch.Tensor) -> Packed:
        """The tensor in this layout. Raises RegaugeError where it does not fit."""
        reason = self.misfit(tensor)
        if reason is not None:
            raise RegaugeError(f"a tensor {list(tensor.shape)} cannot be stored as {self.name}: {reason}")
        return Packed(self, tuple(tensor.shape), self._parts(tensor.detach()))

    @abstractmethod
    def _parts(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]: ...

    @abstractmethod
    def unpack(self, packed: Packed) -> torch.Tensor:
        """The tensor that was packed; use :meth:`Packed.unpack`."""

    def kernel_misfit(self, weight: torch.Tensor) -> str | None:
        """The reason that torch's linear cannot run on such a weight [outputs, inputs]; None where it can."""
        return "torch has no kernel for it"

    def operand(self, weight: torch.Tensor) -> torch.Tensor:
        """The operand of torch's linear for a weight that :meth:`kernel_misfit` lets pass."""
        raise RegaugeError(f"nothing multiplies with the layout {self.name}: {self.kernel_misfit(weight)}")


@dataclass(frozen=True)
class Dense(Layout):
    """Every entry."""

    name = "dense"

    def _parts(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {"values": tensor}

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.parts["values"]

    def kernel_misfit(self, weight: torch.Tensor) -> str | None:
        return None

    def operand(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


@dataclass(frozen=True)
class Masked(Layout):
    """A bit for each entry, from the lowest of each byte on, and the entries that are there in order."""

    name = "masked"

    def _parts(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        mask = is_there(tensor)
        return {"values": tensor[mask], "mask": packed_bits(mask.reshape(-1), 1)}

    def unpack(self, packed: Packed) -> torch.Tensor:
        values = packed.parts["values"]
        found = values.new_zeros(packed.shape)
        mask = unpacked_bits(packed.parts["mask"], 1, found.numel()).bool()
        found.view(-1)[mask] = values
        return found


@dataclass(frozen=True)
class Coo(Layout):
    """The entries that are there, in order, and their flat positions in int64."""

    name = "coo"

    def _parts(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        flat = tensor.reshape(-1)
        positions = is_there(flat).nonzero()[:, 0]
        return {"values": flat[positions], "positions": positions}

    def unpack(self, packed: Packed) -> torch.Tensor:
        found = packed.parts["values"].new_zeros(packed.shape)
        found.view(-1)[packed.parts["positions"]] = packed.parts["values"]
        return found


@dataclass(frozen=True)
class Blocks(Layout):
    """Blocks of ``rows`` by ``columns`` of which an entry is there: ``starts`` of each row of blocks, their columns."""

    rows: int
    columns: int

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}"

    def misfit(self, tensor: torch.Tensor) -> str | None:
        if tensor.dim() != 2:
            return "it is no matrix"
        fits = tensor.shape[0] % self.rows == 0 and tensor.shape[1] % self.columns == 0
        return None if fits else f"its sizes are no multiples of {self.rows} and {self.columns}"

    def _parts(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        rows, columns = tensor.shape[0] // self.rows, tensor.shape[1] // self.columns
        blocks = tensor.reshape(rows, self.rows, columns, self.columns).transpose(1, 2)
        there = is_there(blocks).any(3).any(2)
        starts = torch.zeros(rows + 1, dtype=torch.int32, device=tensor.device)
        starts[1:] = there.sum(1).cumsum(0)
        return {"values": blocks[there], "columns": there.nonzero()[:, 1].to(torch.int32), "starts": starts}

    def unpack(self, packed: Packed) -> torch.Tensor:
        values, columns, starts = (packed.parts[part] for part in ("values", "columns", "starts"))
        grid = (packed.shape[0] // self.rows, packed.shape[1] // self.columns)
        found = values.new_zeros(*grid, self.rows, self.columns)
        rows = torch.arange(grid[0], device=values.device).repeat_interleave(starts.diff().long())
        found[rows, columns.long()] = values.reshape(-1, self.rows, self.columns)
        return found.transpose(1, 2).reshape(packed.shape)

    def kernel_misfit(self, weight: torch.Tensor) -> str | None:
        return self.misfit(weight)

    def operand(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to_sparse_bsr((self.rows, self.columns))


@dataclass(frozen=True)
class Csr(Layout):
    """The entries that are there by rows: ``starts`` of each row, and their columns; blocks of one entry."""

    name = "csr"

    def misfit(self, tensor: torch.Tensor) -> str | None:
        return _SINGLE.misfit(tensor)

    def _parts(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        parts = dict(_SINGLE._parts(tensor))
        return {**parts, "values": parts["values"].reshape(-1)}

    def unpack(self, packed: Packed) -> torch.Tensor:
        return _SINGLE.unpack(packed)

    def kernel_misfit(self, weight: torch.Tensor) -> str | None:
        return self.misfit(weight)

    def operand(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to_sparse_csr()


_SINGLE = Blocks(1, 1)


@dataclass(frozen=True)
class NofM(Layout):
    """At most ``keep`` of every ``of`` neighbours in a row: ``values`` and ``places``.

        weight [rows, columns]   ->   values [rows, columns keep / of]
                                      places: for each value where of ``of`` it stood, in so many bits as that takes

    Of 2:4 these are two bits, so that 16 columns share 16: the layout of the PTX instruction mma.sp. Torch's kernels
    want them in another order, in which torch puts them itself. Negative zeros that are left out come back as zeros.
    """

    keep: int
    of: int

    @property
    def name(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def _width(self) -> int:
        return max(1, (self.of - 1).bit_length())

    def misfit(self, tensor: torch.Tensor) -> str | None:
        if tensor.dim() != 2:
            return "it is no matrix"
        if tensor.shape[1] % self.of:
            return f"its columns are no multiple of {self.of}"
        most = int((tensor != 0).reshape(-1, self.of).sum(1).max()) if tensor.numel() else 0
        return None if most <= self.keep else f"it is not {self.name}: make it so by sparsify{{pattern={self.name}}}"

    def _parts(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        rows, count = tensor.shape[0], tensor.shape[1] // self.of
        groups = tensor.reshape(rows, count, self.of)
        # those that are not zero; where there are fewer, zeros fill up; in rising order
        ranked = (groups != 0).to(torch.uint8).argsort(dim=2, descending=True, stable=True)
        chosen = ranked[:, :, : self.keep].sort(2).values
        values, places = (part.reshape(rows, count * self.keep) for part in (groups.gather(2, chosen), chosen))
        return {"values": values, "places": packed_bits(places, self._width)}

    def unpack(self, packed: Packed) -> torch.Tensor:
        values = packed.parts["values"]
        rows, groups = packed.shape[0], packed.shape[1] // self.of
        places = unpacked_bits(packed.parts["places"], self._width, groups * self.keep)
        shape = (rows, groups, self.keep)
        found = values.new_zeros(rows, groups, self.of)
        return found.scatter(2, places.reshape(shape), values.reshape(shape)).reshape(packed.shape)

    def kernel_misfit(self, weight: torch.Tensor) -> str | None:
        if (self.keep, self.of) != (2, 4):
            return "torch has kernels for 2:4 only"
        if weight.dim() != 2:
            return "it is no matrix"
        if weight.dtype not in _TYPES:
            return "it is neither float16 nor bfloat16"
        if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
            return f"its sizes are no multiples of {_ROWS} and {_COLUMNS}"
        return self.misfit(weight)

    def operand(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.sparse.to_sparse_semi_structured(weight.contiguous())


LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Let a layout be one of :data:`LAYOUTS`, by its name. Raises RegaugeError for a name that another one has."""
    if LAYOUTS.setdefault(layout.name, layout) != layout:
        raise RegaugeError(f"there is another layout {layout.name}: give yours another name")
    return layout


def smallest(tensor: torch.Tensor, layouts: Iterable[Layout] | None = None) -> Packed:
    """The tensor in the layout that takes the fewest bytes, of those that it fits; of equal ones the first.

    Without ``layouts`` all that are registered are tried. Raises RegaugeError where none fits.
    """
    tried = list(LAYOUTS.values() if layouts is None else layouts)
    found = [layout.pack(tensor) for layout in tried if layout.misfit(tensor) is None]
    if not found:
        names = ", ".join(layout.name for layout in tried)
        raise RegaugeError(f"a tensor {list(tensor.shape)} fits none of {names or 'no layouts'}: add dense")
    return min(found, key=lambda packed: packed.bytes)


def is_there(tensor: torch.Tensor) -> torch.Tensor:
    """Whether any bit of each entry is set."""
    size = tensor.element_size()
    return (tensor.reshape(-1).view(torch.uint8).reshape(-1, size) != 0).any(1).reshape(tensor.shape)


def packed_bits(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers of ``width`` bits [..., n] one behind the other in bytes [..., b], each from its lowest bit on."""
    places = torch.arange(width, device=numbers.device)
    bits = ((numbers.to(torch.int64)[..., None] >> places) & 1).flatten(-2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    powers = 1 << torch.arange(8, device=numbers.device)
    found: torch.Tensor = (bits.reshape(*bits.shape[:-1], bits.shape[-1] // 8, 8) * powers).sum(-1).to(torch.uint8)
    return found


def unpacked_bits(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """The first ``count`` numbers of ``width`` bits [..., count] that bytes [..., b] hold."""
    places = torch.arange(8, device=packed.device)
    bits = ((packed.to(torch.int64)[..., None] >> places) & 1).flatten(-2)[..., : width * count]
    powers = 1 << torch.arange(width, device=packed.device)
    found: torch.Tensor = (bits.reshape(*bits.shape[:-1], count, width) * powers).sum(-1)
    return found


for _layout in (Dense(), Masked(), Coo(), Csr(), Blocks(4, 4), NofM(2, 4)):
    register_layout(_layout)
