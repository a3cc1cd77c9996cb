"""Heads of several feature maps joined into one, and where they stay apart."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn, randn

import regauge
from regauge.ir.cost import figures
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.passes.simplify import heads
from regauge.passes.simplify.simplify import Simplify
from simplified import simplified
from simplifying import counts, made, ops, same_function

MAPS = {"x": (1, 4, 6, 4), "y": (1, 4, 3, 2)}


def joined(graph: Graph) -> Graph:
    """After the step alone, which a second run leaves as it is."""
    step = [Simplify(only=("dead-code", "heads"))]
    after = regauge.optimize(graph, step)
    same_function(graph, after)
    assert str(regauge.optimize(after, step)) == str(after)
    return after


def head(build: Builder, x: Value, name: str, anchors: int, size: int, **how: Any) -> Value:
    """``1 c h w`` to ``1 (h w a) s``: kernels of ``kernel``, or depthwise ones, an activation and kernels of one."""
    kernel, act, bias = how.get("kernel", 1), how.get("act", "relu"), how.get("bias", True)

    def conv(x: Value, name: str, count: int, kernel: int, groups: int = 1) -> Value:
        shape = (count, x.shape[1] // groups, kernel, kernel)
        weight = build.parameter(f"{name}.weight", randn(shape).double())
        vector = build.parameter(f"{name}.bias", randn(count).double()) if bias else None
        padding = (kernel // 2, kernel // 2)
        return build.conv(x, weight, vector, padding=padding, groups=groups)  # type: ignore[no-any-return]

    if how.get("deep", False):
        kernel = 1
        x = build(act, conv(x, f"{name}.deep", x.shape[1], 3, x.shape[1]))
    turned = build.permute(conv(x, name, anchors * size, kernel), dims=(0, 2, 3, 1))
    return build.reshape(turned, shape=(1, int(x.shape[2] * x.shape[3]) * anchors, size))  # type: ignore[no-any-return]


def detector(sizes: tuple[int, ...] = (2, 4), levels: Any = ({"anchors": 3}, {"anchors": 2}), dim: int = 1) -> Any:
    def build_all(build: Builder, x: Value, y: Value) -> list[Value]:
        features = [build.tanh(x), build.tanh(y)]
        return [
            build.concat(
                *(
                    head(build, f, f"head{k}.{n}", size=s, **how)
                    for n, (f, how) in enumerate(zip(features, levels, strict=True))
                ),
                dim=dim,
            )
            for k, s in enumerate(sizes)
        ]

    return build_all


def test_heads_of_one_map_become_one_and_their_channels_lie_anchor_by_anchor() -> None:
    graph = made(detector(), **MAPS)
    after = joined(graph)
    assert counts(after) == {"tanh": 2, "conv": 2, "permute": 2, "reshape": 2, "concat": 1, "split": 1}
    assert figures(after)[:2] == figures(graph)[:2]  # parameters and MACs
    assert after.parameters["head0.0_0.weight"].shape == (18, 4, 1, 1)
    rows = [graph.parameters[f"head{k}.0.bias"].tensor.reshape(3, -1) for k in (0, 1)]
    assert torch.equal(after.parameters["head0.0_0.bias"].tensor, torch.cat(rows, 1).reshape(-1))


def test_three_heads_of_equal_sizes_without_bias() -> None:
    levels = ({"anchors": 2, "kernel": 3, "bias": False}, {"anchors": 1})
    after = joined(made(detector((2, 2, 2), levels), **MAPS))
    assert counts(after)["conv"] == 2 and counts(after)["concat"] == 1
    assert ops(after)[-1] == "split" and after.nodes[-1].attributes["sizes"] == (2, 2, 2)


def test_depthwise_layers_read_their_value_twice_and_the_layers_behind_them_get_zeros() -> None:
    deep = {"anchors": 3, "deep": True}
    graph = made(detector((2, 4), (deep, {"anchors": 2})), **MAPS)
    pays = made(lambda b, x, y: [*detector((2, 4), (deep, {"anchors": 2}))(b, x, y), *work(b, x)], **MAPS)
    kept, after = joined(graph), joined(pays)
    assert counts(kept)["conv"] == 5  # the zeros would be more than a part in 32 of so small a graph
    assert counts(after)["conv"] == 4 and counts(after)["relu"] == 1 and counts(after)["concat"] == 2
    blocks = after.parameters["head0.0_0.weight"].tensor.reshape(3, 6, 8)
    assert not blocks[:, :2, 4:].any() and not blocks[:, 2:, :4].any() and bool((blocks != 0).sum() == 3 * 6 * 4)


def work(build: Builder, x: Value) -> list[Value]:
    """Another output that takes many MACs, and a weight that is read for nothing, which makes room for zeros."""
    build.mul(x, build.parameter("spare", randn(200, 1, 1, 1).double()))
    weight = build.parameter("work", randn(256, 4, 5, 5).double())
    return [build.conv(x, weight, padding=(2, 2))]


@pytest.mark.parametrize(
    ("price", "conv", "relu", "concat", "added"),
    [({}, 4, 1, 2, 0), ({"COPY_MACS": 1 << 30}, 6, 2, 1, 1), ({"COPY_MACS": 1 << 30, "NODE_MACS": 0}, 6, 2, 2, 0)],
)
def test_a_level_is_joined_or_summed_or_laid_side_by_side(
    price: dict[str, int], conv: int, relu: int, concat: int, added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, or without reading a value twice over, or not at all, as the prices say."""
    levels = ({"anchors": 3, "deep": True}, {"anchors": 2})
    graph = made(lambda b, x, y: [*detector((2, 4), levels)(b, x, y), *work(b, x)], **MAPS)
    for name, value in {"RUN_MACS": 0, **price}.items():
        monkeypatch.setattr(heads, name, value)
    found = counts(joined(graph))
    assert [found.get(op, 0) for op in ("conv", "relu", "concat", "add")] == [conv, relu, concat, added]


def test_zeros_take_the_room_that_others_made() -> None:
    levels = ({"anchors": 3, "deep": True}, {"anchors": 2})
    graph = made(lambda b, x, y: [*detector((2, 4), levels)(b, x, y), *work(b, x)], **MAPS)
    after = regauge.optimize(graph, [Simplify(only=("heads",))])  # the spare weight is still there
    assert figures(after).parameters == figures(graph).parameters and counts(after)["conv"] == 6


@pytest.mark.parametrize(
    ("sizes", "levels", "dim"),
    [
        ((2, 4), ({"anchors": 3, "kernel": 3}, {"anchors": 2}), 2),  # the concatenation is along the axis of the parts
        ((2,), ({"anchors": 3}, {"anchors": 2}), 1),
    ],
)
def test_heads_that_are_concatenated_along_their_own_axis_or_alone_stay(sizes: Any, levels: Any, dim: int) -> None:
    if dim == 2:
        maps = {"x": (1, 4, 3, 4), "y": (1, 4, 6, 3)}
        graph = made(detector(sizes, levels, dim), **maps)
    else:
        graph = made(detector(sizes, levels, dim), **MAPS)
    assert ops(joined(graph)) == ops(graph)


def changed(what: str) -> Graph:
    """Two heads of two maps of which one does something else, has other readers, or shares a weight."""

    def build_all(build: Builder, x: Value, y: Value) -> list[Value]:
        features = [build.tanh(x), build.tanh(y)]
        shared = build.parameter("shared", randn(6, 4, 1, 1).double())
        outputs, extra = [], []
        for k, size in enumerate((2, 4 if what != "shared" else 2)):
            parts = []
            for n, feature in enumerate(features):
                last = k == 1
                count = 3 * size
                kernel = (3, 3) if what == "kernel" and last else (1, 1)
                weight = build.parameter(f"w{k}{n}", randn(count, 4, *kernel).double())
                weight = shared if what == "shared" else weight
                maps = build.conv(feature, weight, padding=(kernel[0] // 2, kernel[0] // 2))
                maps = build(("relu", "sigmoid")[last] if what == "act" else "relu", maps)
                if what in ("readers", "output") and last:
                    extra.append(build.exp(maps) if what == "readers" else maps)
                maps = build.permute(maps, dims=(0, 3, 2, 1) if what == "order" and last else (0, 2, 3, 1))
                parts.append(build.reshape(maps, shape=(1, int(feature.shape[2] * feature.shape[3]) * 3, size)))
            outputs.append(build.concat(*(reversed(parts) if what == "turned" and k else parts), dim=1))
        return [*outputs, *extra]

    return made(build_all, **MAPS)


@pytest.mark.parametrize("what", ["kernel", "act", "readers", "output", "order", "turned", "shared"])
def test_heads_that_differ_or_are_read_by_others_stay(what: str) -> None:
    graph = changed(what)
    assert ops(joined(graph)) == ops(graph)
    assert len(ops(joined(changed("")))) < len(ops(changed("")))


def test_heads_of_different_maps_stay() -> None:
    def build_all(build: Builder, x: Value, y: Value) -> list[Value]:
        first, second = build.tanh(x), build.tanh(y)
        pairs = ((first, second), (build.exp(x), build.exp(y)))
        return [
            build.concat(*(head(build, f, f"h{k}{n}", 2, 3) for n, f in enumerate(pair)), dim=1)
            for k, pair in enumerate(pairs)
        ]

    graph = made(build_all, **MAPS)
    assert ops(joined(graph)) == ops(graph)


class RetinaNet(nn.Module):
    """Classes and boxes of two maps, reshaped before they are permuted, for any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.classes, self.boxes = (
            nn.ModuleList([nn.Conv2d(8, 3 * size, 3, padding=1) for _ in range(2)]) for size in (5, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x).relu()
        features, results = (first, self.down(first).relu()), []
        for size, maps in ((5, self.classes), (4, self.boxes)):
            parts = []
            for feature, conv in zip(features, maps, strict=True):
                n, _, h, w = feature.shape
                parts.append(conv(feature).view(n, 3, size, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, size))
            results.append(torch.cat(parts, 1))
        return torch.cat([results[0].sigmoid().amax(-1, keepdim=True) * results[1], results[0]], -1)


def test_a_module_with_heads() -> None:
    x = randn(2, 3, 16, 8)
    graph = simplified(RetinaNet(), x, dynamic={0: {0: "batch"}})
    found = counts(graph)
    assert (found["conv"], found["permute"], found["split"]) == (4, 2, 1)
    apart = simplified(RetinaNet(), x, dynamic={0: {0: "batch"}}, passes="simplify{skip=heads}")
    assert counts(apart)["conv"] == 6 and len(ops(apart)) == len(ops(graph)) + 8
