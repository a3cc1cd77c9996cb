"""Layout operators: which axes stay free, and that the sizes in their attributes follow a cut."""

import sys

import pytest
import torch
from torch import randn

from cutting import cut_all, free_sizes
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.operator import find_aten
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import symbol

BATCH = symbol("batch")


class Network:
    """A graph under construction whose first layer makes free channels: x (2, 3) -> (2, width)."""

    def __init__(self, width: int = 8, batch: object = 2) -> None:
        self.graph = Graph()
        self.build = Builder(self.graph)
        x = self.build.input("x", (batch, 3), torch.float32)  # type: ignore[arg-type]
        self.h: Value = self.build.linear(x, self.weight("first", width, 3))

    def weight(self, name: str, *shape: int) -> Value:
        return self.build.parameter(name, randn(*shape))

    def aten(self, name: str, *args: object, **kwargs: object) -> object:
        """Call an operator as torch.export states it."""
        found = find_aten(name)
        assert found is not None and found[1] is not None
        return found[1](self.build, *args, **kwargs)

    def finish(self, h: Value) -> Graph:
        """A last layer over the last axis, whose output axes are pinned."""
        self.graph.outputs = [self.build.linear(h, self.weight("last", 5, int(h.shape[-1])))]
        return self.graph

    def check(self, h: Value) -> Graph:
        return cut_all(self.finish(h), [randn(2, 3)])


def node(graph: Graph, op: str) -> Node:
    return next(n for n in graph.nodes if n.op == op)


def test_zero_padding_of_channels_is_a_concat_with_free_segments() -> None:
    net = Network()
    small = net.check(net.build.pad(net.h, pads=((0, 0), (2, 4))))
    assert free_sizes(net.graph) == {"first:0": 8, "last:1.0": 2, "last:1.2": 4}
    assert node(small, "pad").attributes["pads"] == ((0, 0), (1, 2))


def test_padding_with_another_number_pins_the_new_entries_only() -> None:
    net = Network()
    net.check(net.build.pad(net.h, pads=((0, 0), (2, 4)), value=1.0))
    assert free_sizes(net.graph) == {"first:0": 8}


def test_reflected_padding_pins_its_axis_and_no_other() -> None:
    net = Network()
    h = net.build.unsqueeze(net.h, dim=2)
    h = net.build.expand(h, shape=(2, 8, 6))
    net.check(net.build.permute(net.build.pad(h, pads=((0, 0), (0, 0), (1, 2)), mode="reflect"), dims=(0, 2, 1)))
    assert free_sizes(net.graph) == {"first:0": 8}


def test_negative_padding_is_a_slice() -> None:
    net = Network()
    small = net.check(net.aten("constant_pad_nd", net.h, [-2, 3]))  # type: ignore[arg-type]
    assert free_sizes(net.graph) == {"first:0.0": 2, "first:0.1": 6, "last:1.1": 3}
    assert node(small, "slice").attributes["start"] == 1
    assert node(small, "pad").attributes["pads"] == ((0, 0), (0, 2))


def test_residual_added_to_padded_channels_shares_the_zero_segment() -> None:
    net = Network()
    wide = net.build.linear(net.graph.inputs[0], net.weight("wide", 12, 3))
    net.check(net.build.add(wide, net.build.pad(net.h, pads=((0, 0), (0, 4)))))
    assert free_sizes(net.graph) == {"first:0": 8, "wide:0.1": 4}


def test_channel_shuffle_frees_groups_and_channels() -> None:
    net = Network(12)
    h = net.aten("channel_shuffle", net.build.unsqueeze(net.h, dim=2), 3)
    small = net.check(net.build.squeeze(h, dims=(2,)))  # type: ignore[arg-type]
    assert free_sizes(net.graph) == {"first:0.0": 3, "first:0.1": 4}
    assert small.parameters["last"].shape == (5, 4)


def test_a_cut_inside_an_entry_of_a_product_pins_that_entry_only() -> None:
    """Channels (h=6 d=2) that are halved after five entries: h is (2 + 1 + 3), and the entry in the middle stays."""
    net = Network(12)
    h = net.build.reshape(net.build.reshape(net.h, shape=(2, 6, 2)), shape=(2, 12))
    small = net.check(net.build.slice(h, dim=1, start=5, end=12))
    assert free_sizes(net.graph) == {"first:0.0": 2, "first:0.1": 3}
    assert small.parameters["first"].shape == (2 * (1 + 1 + 2), 3)
    assert node(small, "slice").attributes["start"] == 3


def test_uneven_segments_are_gathered_before_they_are_interleaved() -> None:
    """A shuffle of (1 + 3 + 4) channels in two groups: the first two segments together are as long as the third."""
    net = Network()
    parts = net.aten("split_with_sizes", net.h, [1, 3, 4], 1)
    h = net.build.unsqueeze(net.build.concat(*parts, dim=1), dim=2)  # type: ignore[misc]
    net.check(net.build.squeeze(net.aten("channel_shuffle", h, 2), dims=(2,)))  # type: ignore[arg-type]
    assert free_sizes(net.graph) == {"first:0.0": 3}


def test_repeated_kv_heads_have_a_free_repeat_dim() -> None:
    net = Network()
    heads = net.build.reshape(net.h, shape=(2, 2, 4))  # two heads of four
    h = net.build.expand(net.build.unsqueeze(heads, dim=2), shape=(2, 2, 3, 4))
    net.check(net.build.reshape(h, shape=(2, 24)))
    assert free_sizes(net.graph) == {"first:0.0": 2, "first:0.1": 4, "last:1.1": 3}


@pytest.mark.parametrize("op", ["repeat", "repeat_interleave"])
def test_repeats_are_derived(op: str) -> None:
    net = Network()
    options = {"repeats": (1, 4)} if op == "repeat" else {"repeats": 4, "dim": 1}
    small = net.check(net.build(op, net.h, **options))
    assert sorted(free_sizes(net.graph).values()) == [4, 8]
    assert node(small, op).attributes["repeats"] in ((1, 2), 2)


def test_stacked_tensors_share_axes_and_the_new_axis_is_pinned() -> None:
    net = Network()
    other = net.build.linear(net.graph.inputs[0], net.weight("other", 8, 3))
    net.check(net.build.reshape(net.build.stack(net.h, other, dim=2), shape=(2, 16)))
    assert free_sizes(net.graph) == {"first:0": 8}


def test_split_and_chunk_derive_their_sizes() -> None:
    net = Network(12)
    a, b, c = net.aten("split_with_sizes", net.h, [2, 4, 6], 1)  # type: ignore[misc]
    d, e = net.aten("chunk", c, 2, -1)  # type: ignore[misc]
    small = net.check(net.build.concat(net.build.add(d, e), b, a, dim=1))
    assert free_sizes(net.graph) == {"first:0.0": 2, "first:0.1": 4, "first:0.2": 3}
    assert [n.attributes["sizes"] for n in small.nodes if n.op == "split"] == [(1, 2, 4), (2, 2)]


def test_slice_bounds_follow_what_lies_before_them() -> None:
    net = Network()
    small = net.check(net.aten("slice.Tensor", net.h, 1, 4, sys.maxsize))  # type: ignore[arg-type]
    assert free_sizes(net.graph) == {"first:0.0": 4, "first:0.1": 4}
    assert (node(small, "slice").attributes["start"], node(small, "slice").attributes["end"]) == (2, 4)


def test_negative_bounds_are_normalised_at_import() -> None:
    net = Network()
    h = net.aten("slice.Tensor", net.h, -1, -6, -1)
    assert isinstance(h, Value) and h.producer is not None
    assert h.producer.attributes == {"dim": 1, "start": 2, "end": 7, "step": 1}
    assert net.aten("slice.Tensor", net.h, 1, 0, sys.maxsize) is net.h
    picked = net.aten("select.int", net.h, -1, -1)
    assert isinstance(picked, Value) and picked.producer is not None
    assert picked.producer.attributes == {"dim": 1, "index": 7}


def test_strided_slices_pin_the_phase_and_free_the_rest() -> None:
    net = Network()
    even, odd = (net.build.slice(net.h, dim=1, start=start, end=8, step=2) for start in (0, 1))
    small = net.check(net.build.sub(even, odd))
    assert free_sizes(net.graph) == {"first:0.0": 4}
    assert [n.attributes["end"] for n in small.nodes if n.op == "slice"] == [4, 4]
    assert small.parameters["first"].shape == (4, 3)


def test_interleaved_pairs_can_be_cut_pair_by_pair() -> None:
    """Rotary embeddings of GPT-J: split into even and odd, rotate, stack, flatten."""
    net = Network()
    even, odd = (net.build.slice(net.h, dim=1, start=start, end=8, step=2) for start in (0, 1))
    rotated = net.build.reshape(net.build.stack(net.build.neg(odd), even, dim=2), shape=(2, 8))
    net.check(net.build.add(rotated, net.h))
    assert free_sizes(net.graph) == {"first:0.0": 4}


def test_select_unbind_flip_and_roll_pin_their_axis_only() -> None:
    net = Network()
    h = net.build.reshape(net.h, shape=(2, 4, 2))
    first, second = net.build.unbind(h, dim=2)
    h = net.build.stack(first, second, net.build.select(h, dim=2, index=1), dim=2)
    h = net.build.flip(net.build.roll(h, shifts=(1,), dims=(2,)), dims=(2,))
    net.check(net.build.reshape(h, shape=(2, 12)))
    assert free_sizes(net.graph) == {"first:0.0": 4}


def test_slice_scatter_splits_the_axis_around_the_source() -> None:
    net = Network()
    source = net.build.linear(net.graph.inputs[0], net.weight("source", 3, 3))
    small = net.check(net.build.slice_scatter(net.h, source, dim=1, start=2, end=5))
    assert free_sizes(net.graph) == {"first:0.0": 2, "first:0.1": 3, "first:0.2": 3}
    assert (node(small, "slice_scatter").attributes["start"], node(small, "slice_scatter").attributes["end"]) == (1, 3)


def test_tiling_windows_are_a_reshape_and_overlapping_ones_pin() -> None:
    net = Network()
    windows = net.build.unfold(net.h, dim=1, size=4, step=4)
    small = net.check(net.build.reshape(windows, shape=(2, 8)))
    assert free_sizes(net.graph) == {"first:0.0": 2, "first:0.1": 4}
    assert node(small, "unfold").attributes["size"] == node(small, "unfold").attributes["step"] == 2
    net = Network()
    net.check(net.build.reshape(net.build.unfold(net.h, dim=1, size=4, step=2), shape=(2, 12)))
    assert free_sizes(net.graph) == {}


def test_pixel_shuffle_frees_the_channels_only() -> None:
    net = Network(24)
    h = net.build.pixel_shuffle(net.build.reshape(net.h, shape=(2, 24, 1, 1)), factor=2)
    small = net.check(net.build.reshape(net.build.permute(h, dims=(0, 2, 3, 1)), shape=(8, 6)))
    assert free_sizes(net.graph) == {"first:0.0": 6}
    assert small.parameters["first"].shape == (12, 3)


def test_filled_tensors_follow_the_axes_they_meet() -> None:
    net = Network()
    ones = net.aten("new_ones", net.h, [2, 8])
    assert isinstance(ones, Value)
    small = net.check(net.build.concat(net.build.add(net.h, ones), net.aten("zeros", [2, 4]), dim=1))  # type: ignore[arg-type]
    assert free_sizes(net.graph) == {"first:0": 8, "last:1.1": 4}
    assert [n.attributes["shape"] for n in small.nodes if n.op == "full"] == [(2, 4), (2, 2)]


def test_static_tables_become_constants_and_dynamic_ones_stay() -> None:
    net = Network(batch=BATCH)
    table, counted = net.aten("arange.start", 2, 6), net.aten("arange.default", BATCH)
    assert isinstance(table, Value) and table.producer is None and table.shape == (4,) and table.dtype == torch.int64
    assert isinstance(counted, Value) and counted.producer is not None and counted.shape == (BATCH,)
    assert net.aten("eye", 3).producer is None and net.aten("linspace", 0, 1, 5).producer is None  # type: ignore[attr-defined]


def test_dynamic_sizes_survive_in_attributes() -> None:
    net = Network(batch=BATCH)
    h = net.aten("view.default", net.h, [BATCH * 4, -1])
    assert isinstance(h, Value) and h.shape == (4 * BATCH, 2)
    first = net.aten("slice.Tensor", net.aten("expand.default", h, [-1, 2]), 0, 0, BATCH)
    graph = net.finish(first)  # type: ignore[arg-type]
    assert run(graph, [randn(7, 3)])[0].shape == (7, 5)
    assert node(graph, "slice").attributes["end"] == BATCH


def test_empty_axes_keep_their_shape() -> None:
    net = Network()
    empty = net.build.slice(net.h, dim=1, start=3, end=3)
    assert net.aten("flatten.using_ints", net.build.reshape(empty, shape=(2, 0, 4)), 1).shape == (2, 0)  # type: ignore[attr-defined]
    h = net.build.concat(empty, net.h, dim=1)
    net.check(h)
    assert sum(free_sizes(net.graph).values()) == 8


def test_a_split_into_an_unknown_number_of_parts_is_refused() -> None:
    net = Network(batch=BATCH)
    with pytest.raises(OperatorError, match="their number depends on the input"):
        net.aten("split.Tensor", net.h, 3, 0)
    with pytest.raises(OperatorError, match="that has no rule"):
        net.aten("view.dtype", net.h, torch.int32)


def test_flatten_is_emitted_as_a_layer_only_where_it_is_one() -> None:
    net = Network()
    h = net.build.reshape(net.h, shape=(2, 2, 2, 2))
    layer = h.producer.operator.layer
    assert layer is not None and layer(h.producer) is None
    assert layer(net.build.reshape(h, shape=(2, 8)).producer) == "nn.Flatten()"
    assert layer(net.build.reshape(h, shape=(2, 4, 2)).producer) == "nn.Flatten(1, 2)"
    assert layer(net.build.reshape(h, shape=(4, 4)).producer) is None
