"""The extent algebra: unification and refinement checked against the indices themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regauge.ir.dims.extents import (
    ONE,
    Concat,
    Dim,
    Extent,
    Product,
    format_extent,
    fresh,
    leaves,
    pin,
    resolve,
    size_of,
)
from regauge.ir.dims.kept import flat_indices
from regauge.ir.dims.unify import reshape, split_at, split_minor, unify
from regauge.ir.errors import AxisError
from regauge.ir.sizes.expressions import symbol


@st.composite
def extents(draw: st.DrawFn, depth: int = 2) -> Extent:
    kind = draw(st.sampled_from(["dim", "product", "concat"])) if depth else "dim"
    if kind == "dim":
        return fresh(draw(st.sampled_from([1, 2, 3, 4, 6])))
    parts = [draw(extents(depth=depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    return resolve(Product(parts) if kind == "product" else Concat(parts))


def kept_half(extent: Extent) -> dict[Dim, np.ndarray]:
    """Every free Dim of the extent keeps its even indices."""
    return {dim: np.arange(0, int(dim.size), 2) for dim in leaves(extent) if not dim.pins}


@given(extents())
def test_flat_indices_of_an_uncut_extent_are_all_positions(extent: Extent) -> None:
    assert flat_indices(extent, {}).tolist() == list(range(int(size_of(extent))))


@given(extents(), extents())
def test_unified_extents_keep_the_same_positions(a: Extent, b: Extent) -> None:
    if size_of(a) != size_of(b):
        with pytest.raises(AxisError, match="cannot be the same"):
            unify(a, b)
        return
    unify(a, b)
    keep = {**kept_half(a), **kept_half(b)}
    assert flat_indices(a, keep).tolist() == flat_indices(b, keep).tolist()


@given(extents(), st.data())
def test_a_split_cuts_the_positions_in_two(extent: Extent, data: st.DataObject) -> None:
    size = int(size_of(extent))
    offset = data.draw(st.integers(0, size))
    parts = split_at(extent, offset)
    if parts is None:
        return
    assert (size_of(parts[0]), size_of(parts[1])) == (offset, size - offset)
    keep = {**kept_half(parts[0]), **kept_half(parts[1])}
    joined = [*flat_indices(parts[0], keep), *(flat_indices(parts[1], keep) + offset)]
    assert flat_indices(extent, keep).tolist() == joined


@given(extents(), st.data())
def test_a_minor_split_lays_the_positions_out_in_rows(extent: Extent, data: st.DataObject) -> None:
    size = int(size_of(extent))
    minor = data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
    parts = split_minor(extent, minor)
    if parts is None:
        return
    keep = {**kept_half(parts[0]), **kept_half(parts[1])}
    rows = flat_indices(parts[0], keep)[:, None] * minor + flat_indices(parts[1], keep)[None, :]
    assert flat_indices(extent, keep).tolist() == rows.reshape(-1).tolist()


@given(st.lists(extents(depth=1), min_size=1, max_size=2), st.data())
def test_reshape_keeps_the_positions_in_row_major_order(axes: list[Extent], data: st.DataObject) -> None:
    sizes = [int(size_of(e)) for e in axes]
    total = int(np.prod(sizes))
    first = data.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
    target = [first, total // first]
    result = reshape(axes, target)
    assert [size_of(e) for e in result] == target
    keep: dict[Dim, np.ndarray] = {}
    for extent in [*axes, *result]:
        keep.update(kept_half(extent))
    array = np.arange(total)
    before = array.reshape(sizes)[np.ix_(*[flat_indices(e, keep) for e in axes])].reshape(-1)
    after = array.reshape(target)[np.ix_(*[flat_indices(e, keep) for e in result])].reshape(-1)
    assert before.tolist() == after.tolist()


def test_rotary_halves_become_the_same_dim() -> None:
    axis = Dim(8)
    first, second = split_at(axis, 4)  # type: ignore[misc]
    unify(Concat((first, second)), Concat((second, first)))
    assert resolve(first) is resolve(second)
    assert flat_indices(axis, {resolve(first): np.array([1])}).tolist() == [1, 5]  # type: ignore[dict-item]


def test_fused_qkv_as_product_and_as_concat() -> None:
    weight = Product((Dim(3), Dim(2), Dim(4)))
    q, k, v = Dim(8), Dim(8), Dim(8)
    unify(weight, Concat((q, k, v)))
    assert resolve(q) is resolve(k) or format_extent(q) == format_extent(k)
    keep = {next(iter(leaves(q))): np.array([0])}
    assert flat_indices(weight, keep).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]


def test_channel_shuffle_returns_to_the_same_dims() -> None:
    channels = Dim(12)
    groups, inner = reshape([channels], [3, 4])
    shuffled = resolve(Product((inner, groups)))
    assert format_extent(shuffled) == "(dim=4 dim=3)"
    keep = {groups: np.array([0, 2])}
    assert flat_indices(shuffled, keep).tolist() == [0, 2, 3, 5, 6, 8, 9, 11]  # type: ignore[arg-type]


def test_reshape_without_common_layout_pins_only_what_it_mixes() -> None:
    batch, a, b = Dim(5), Dim(4), Dim(6)
    result = reshape([batch, a, b], [5, 3, 8])
    assert resolve(result[0]) is batch and not batch.pins
    assert a.pins and b.pins and all(dim.pins for extent in result[1:] for dim in leaves(extent))


def test_symbolic_sizes_fold_and_unfold() -> None:
    batch, sequence = symbol("batch"), symbol("seq")
    rows, width = Dim(batch * sequence), Dim(64)
    b, s, heads, size = reshape([rows, width], [batch, sequence, 4, 16])
    assert [size_of(e) for e in (b, s, heads, size)] == [batch, sequence, 4, 16]
    (again,) = reshape([b, s], [batch * sequence])
    assert format_extent(again) == format_extent(rows)


def test_a_dim_inside_itself_is_pinned() -> None:
    inner = Dim(4)
    unify(Product((ONE, inner)), inner)
    assert not inner.pins
    outer, factor = Dim(8), Dim(4)
    unify(outer, Product((factor, Dim(2))))
    left, right = Dim(2), Dim(2)
    unify(factor, Product((left, right)))
    unify(Product((right, left, left)), outer)
    assert len({dim for dim in leaves(outer)}) == 1


def test_pins_follow_a_refinement() -> None:
    axis = Dim(6)
    pin(axis, "it is an axis of a graph input", "x")
    parts = split_minor(axis, 2)
    assert parts is not None
    assert all(dim.pins[0].where == "x" for part in parts for dim in leaves(part))


def test_size_one_vanishes_in_products_and_stays_in_concats() -> None:
    dim = Dim(3)
    assert resolve(Product((ONE, dim, ONE))) is dim
    joined = Concat((ONE, dim))
    assert size_of(joined) == 4
    assert flat_indices(joined, {dim: np.array([2])}).tolist() == [0, 3]
