"""Layouts of weights with zeros: nothing is lost, bytes are as counted by hand, and the smallest is found."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse import _semi_structured_conversions as conversions

from regauge.ir.errors import RegaugeError
from regauge.ir.storage.sparse_layouts import (
    LAYOUTS,
    Blocks,
    Coo,
    Csr,
    Dense,
    Layout,
    Masked,
    NofM,
    Packed,
    packed_bits,
    register_layout,
    smallest,
    unpacked_bits,
)
from regauge.passes.nm_mask import nm_mask

EVERY = [Dense(), Masked(), Coo(), Csr(), Blocks(2, 4), NofM(2, 4), NofM(1, 4), NofM(3, 8), NofM(1, 2)]
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8]


def weight(rows: int, columns: int, layout: Layout, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator) * 8
    if isinstance(layout, NofM):
        return found * nm_mask(found.abs(), 1, layout.keep, layout.of)
    if isinstance(layout, Blocks):
        kept = torch.rand(rows // layout.rows, columns // layout.columns, generator=generator) < 0.4
        return found * kept.repeat_interleave(layout.rows, 0).repeat_interleave(layout.columns, 1)
    return found * (torch.rand(found.shape, generator=generator) < 0.3)


@pytest.mark.parametrize("layout", EVERY, ids=lambda layout: layout.name)
@given(
    halves=st.integers(0, 4),
    eights=st.integers(0, 5),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(TYPES),
    emptied=st.floats(0, 1),
)
@settings(max_examples=25, deadline=None)
def test_what_is_packed_unpacks_to_what_it_was(
    layout: Layout, halves: int, eights: int, seed: int, dtype: torch.dtype, emptied: float
) -> None:
    tensor = weight(2 * halves, 8 * eights, layout, seed).to(dtype)
    tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < emptied] = 0
    packed = layout.pack(tensor)
    found = packed.unpack()
    assert found.dtype == dtype and torch.equal(found, tensor)
    if not isinstance(layout, NofM):
        assert torch.equal(torch.signbit(found), torch.signbit(tensor)), "negative zeros too"


def test_bytes_by_hand() -> None:
    tensor = torch.zeros(8, 16)
    tensor[0, :2], tensor[4:8, 4:8] = 1, 2  # 18 of 128 entries, in two blocks of 4 x 4
    expected = {
        "dense": 4 * 128, "masked": 4 * 18 + 128 // 8, "coo": (4 + 8) * 18, "csr": (4 + 4) * 18 + 4 * 9,
        "4x4": (4 * 16 + 4) * 2 + 4 * 3,
    }  # fmt: skip
    assert {name: LAYOUTS[name].pack(tensor).bytes for name in expected} == expected
    assert smallest(tensor).layout == Masked()
    assert smallest(tensor, [Dense(), Csr(), Blocks(4, 4)]).layout == Blocks(4, 4)
    assert LAYOUTS["2:4"].misfit(tensor) == "it is not 2:4: make it so by sparsify{pattern=2:4}"
    half = torch.ones(8, 16).half() * nm_mask(torch.rand(8, 16), 1, 2, 4)
    assert NofM(2, 4).pack(half).bytes == 2 * 64 + 128 // 8  # two bits for each of 64 values
    assert NofM(3, 8).pack(half[:, :8] * torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])).bytes == 2 * 24 + 8 * 2  # 9 bits a row
    assert smallest(torch.ones(8, 16)).layout == Dense()


def test_places_of_2_of_4_are_those_of_the_tensor_cores() -> None:
    tensor = weight(64, 128, NofM(2, 4)).half()
    tensor[tensor == 0] = 0
    packed = NofM(2, 4).pack(tensor)
    places = packed.parts["places"].view(torch.int16)  # 16 columns share one number
    values, reordered = conversions.sparse_semi_structured_from_dense_cutlass(tensor)
    assert places.shape == (64, 8) and torch.equal(packed.parts["values"], values)
    assert torch.equal(places.flatten().sort().values, reordered.flatten().sort().values)
    # columns 1 and 2 of the first four: 1 + 2 * 4
    row = torch.tensor([[0, 5, 6, 0, 7, 0, 0, 8]])
    assert NofM(2, 4).pack(row).parts["places"].tolist() == [[0b1100_1001]]


@given(width=st.integers(1, 5), count=st.integers(0, 20), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_bits_come_back(width: int, count: int, seed: int) -> None:
    numbers = torch.randint(0, 1 << width, (3, count), generator=torch.Generator().manual_seed(seed))
    packed = packed_bits(numbers, width)
    assert packed.shape == (3, (width * count + 7) // 8)
    assert torch.equal(unpacked_bits(packed, width, count), numbers)


@pytest.mark.parametrize(
    ("layout", "tensor", "reason"),
    [
        (NofM(2, 4), torch.ones(4, 16), "cannot be stored as 2:4: it is not 2:4: make it so"),
        (NofM(2, 4), torch.zeros(4, 6), "its columns are no multiple of 4"),
        (Blocks(4, 4), torch.ones(6, 8), "no multiples of 4 and 4"),
        (Csr(), torch.ones(2, 2, 2), "it is no matrix"),
    ],
)
def test_what_does_not_fit_is_told(layout: Layout, tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(RegaugeError, match=reason):
        layout.pack(tensor)
    with pytest.raises(RegaugeError, match="fits none of"):
        smallest(tensor, [layout])


@dataclass(frozen=True)
class Repeated(Layout):
    """One entry for all."""

    name = "repeated"

    def misfit(self, tensor: torch.Tensor) -> str | None:
        return None if bool((tensor == tensor.flatten()[0]).all()) else "its entries differ"

    def _parts(self, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {"values": tensor.flatten()[:1]}

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.parts["values"].expand(packed.shape)


def test_a_layout_of_ones_own_is_tried_with_the_others() -> None:
    try:
        assert register_layout(Repeated()) is register_layout(LAYOUTS["repeated"])
        packed = smallest(torch.full((8, 8), 3.0))
        assert packed.layout == Repeated() and packed.bytes == 4
        assert torch.equal(packed.unpack(), torch.full((8, 8), 3.0))
        with pytest.raises(RegaugeError, match="another layout 4x4"):
            register_layout(type("Other", (Repeated,), {"name": "4x4"})())
    finally:
        LAYOUTS.pop("repeated", None)
