"""Random valid graphs for tests of rewrites: layout, pieces, pointwise steps, reductions, products, constants, copies.

Beside :mod:`random_networks`, which has layers to cut, this has what simplification is about: steps that undo each
other, equal nodes, dead code, constants, decided and undecided branches, several outputs, and a batch of dynamic size.
All is float64; shapes as recorded hold for every batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.sizes.expressions import Size, product, symbol

BATCH = symbol("batch")
UNARY = ("relu", "tanh", "sigmoid", "neg", "abs", "silu", "sign", "floor", "identity")
BINARY = ("add", "sub", "mul", "maximum")
REDUCTIONS = ("mean", "sum", "amax", "amin")
MOST_ELEMENTS = 400  # per entry of the batch


class Drawn:
    """A graph in the making, and the values that later steps may read."""

    def __init__(self, draw: Callable[[Any], Any], build: Builder, depth: int = 0) -> None:
        self.draw = draw
        self.build = build
        self.depth = depth
        self.values: list[Value] = []
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def choose(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def any(self, wanted: Callable[[Value], bool] = lambda value: True) -> Value | None:
        found = [value for value in self.values if wanted(value)]
        return self.draw(st.sampled_from(found[-4:])) if found else None

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def weight(self, *shape: int) -> Value:
        return self.build.parameter(self.build.unique("p"), self.tensor(*shape))

    def step(self) -> None:
        made = getattr(self, self.draw(st.sampled_from(STEPS)))()
        for value in made if isinstance(made, tuple | list) else [made]:
            if value is not None and product(s for s in value.shape if isinstance(s, int)) <= MOST_ELEMENTS:
                self.values.append(value)

    # -- pointwise -----------------------------------------------------------------------------------------------------

    def unary(self) -> Any:
        return self.build(self.choose(*UNARY), self.any())

    def undone(self) -> Any:
        x, op = self.any(), self.choose("neg", "abs", "relu", "floor")
        return self.build(op, self.build(op, x))

    def number(self) -> Any:
        x = self.any()
        op, number = self.choose(("add", 0), ("add", 1.5), ("mul", 1.0), ("mul", 0.5), ("sub", 0.0), ("div", 1),
                                 ("div", 2.0), ("pow", 1), ("mul", 0.0))  # fmt: skip
        if self.choose(True, False):
            number = self.build.constant(torch.full(self.choose((), (1,)), number, dtype=torch.float64))
        return self.build(op, x, number)

    def clamp(self) -> Any:
        return self.build.clamp(self.any(), self.choose(None, -1.0, 0.0, 0.5), self.choose(None, 6.0, 0.25))

    def binary(self) -> Any:
        x = self.any()
        assert x is not None
        y = self.any(lambda value: value.shape == x.shape)
        return self.build(self.choose(*BINARY), x, y)

    def scaled(self) -> Any:
        """A constant or a weight along some axes, maybe made by a step or two."""
        x = self.any(lambda value: value.rank > 0 and isinstance(value.shape[-1], int))
        if x is None:
            return None
        size = int(x.shape[-1])
        table = self.weight(size) if self.choose(True, False) else self.build.constant(self.tensor(size))
        if self.choose(True, False):
            table = self.build(self.choose("neg", "relu", "tanh"), table)
        return self.build(self.choose("mul", "add"), x, table)

    def cast(self) -> Any:
        return self.build.cast(self.build.cast(self.any(), dtype=torch.float32), dtype=torch.float64)

    # -- layout --------------------------------------------------------------------------------------------------------

    def permute(self) -> Any:
        x = self.any(lambda value: value.rank > 1)
        return None if x is None else self.build.permute(x, dims=tuple(self.draw(st.permutations(range(x.rank)))))

    def there_and_back(self) -> Any:
        x = self.any(lambda value: value.rank > 1)
        if x is None:
            return None
        dims = self.draw(st.permutations(range(x.rank)))
        y = self.build.permute(x, dims=tuple(dims))
        for _ in range(self.draw(st.integers(0, 2))):
            y = self.build(self.choose("relu", "neg", "silu"), y)
        return self.build.permute(y, dims=tuple(dims.index(axis) for axis in range(x.rank)))

    def reshape(self) -> Any:
        x = self.any(lambda value: value.rank > 1)
        if x is None:
            return None
        shape: list[Size] = list(x.shape)
        if self.choose(True, False):
            at = self.draw(st.integers(0, x.rank - 2))
            shape[at : at + 2] = [product(shape[at : at + 2])]
        else:
            at = self.draw(st.integers(0, x.rank - 1))
            size = shape[at]
            if isinstance(size, int) and size % 2 == 0:
                shape[at : at + 1] = [2, size // 2]
        return self.build.reshape(x, shape=tuple(shape))

    def unsqueeze(self) -> Any:
        x = self.any(lambda value: value.rank < 5)
        return None if x is None else self.build.unsqueeze(x, dim=self.draw(st.integers(0, x.rank)))

    def squeeze(self) -> Any:
        x = self.any(lambda value: 1 in value.shape)
        return None if x is None else self.build.squeeze(x, dims=(x.shape.index(1),))

    def expand(self) -> Any:
        x = self.any(lambda value: 1 in value.shape)
        if x is None:
            return None
        axis = x.shape.index(1)
        return self.build.expand(x, shape=(*x.shape[:axis], self.choose(1, 2, 3), *x.shape[axis + 1 :]))

    # -- pieces --------------------------------------------------------------------------------------------------------

    def _axis(self, least: int = 2) -> tuple[Value, int] | None:
        x = self.any(lambda value: any(isinstance(s, int) and s >= least for s in value.shape))
        if x is None:
            return None
        return x, self.draw(st.sampled_from([a for a, s in enumerate(x.shape) if isinstance(s, int) and s >= least]))

    def slice(self) -> Any:
        found = self._axis()
        if found is None:
            return None
        x, axis = found
        size = int(x.shape[axis])
        start = self.draw(st.integers(0, size - 1))
        end = self.draw(st.integers(start + 1, size))
        return self.build.slice(x, dim=axis, start=start, end=end, step=self.choose(1, 1, 1, 2))

    def split(self) -> Any:
        found = self._axis()
        if found is None:
            return None
        x, axis = found
        first = self.draw(st.integers(1, int(x.shape[axis]) - 1))
        parts = self.build.split(x, sizes=(first, int(x.shape[axis]) - first), dim=axis)
        if self.choose(True, False):
            return [*parts, self.build.concat(*parts, dim=axis)]
        return parts[self.choose(0, 1)]

    def concat(self) -> Any:
        x = self.any(lambda value: value.rank > 0)
        if x is None:
            return None
        axis = self.draw(st.integers(0, x.rank - 1))
        y = self.any(lambda v: v.rank == x.rank and all(a == b for i, (a, b) in enumerate(zip(v.shape, x.shape, strict=True)) if i != axis))  # fmt: skip  # noqa: E501
        return self.build.concat(x, y, *([x] if self.choose(True, False) else []), dim=axis)

    def select(self) -> Any:
        found = self._axis(1)
        if found is None:
            return None
        x, axis = found
        index = self.draw(st.integers(0, int(x.shape[axis]) - 1))
        if self.choose(True, False):
            return self.build.select(x, dim=axis, index=index)
        table = torch.arange(index, int(x.shape[axis])) if self.choose(True, False) else torch.tensor([index, 0])
        return self.build.index_select(x, self.build.constant(table), dim=axis)

    def stack(self) -> Any:
        x = self.any(lambda value: value.rank < 4)
        if x is None:
            return None
        stacked = self.build.stack(x, self.any(lambda value: value.shape == x.shape), dim=0)
        return self.build.select(stacked, dim=0, index=self.choose(0, 1)) if self.choose(True, False) else stacked

    def pad(self) -> Any:
        x = self.any(lambda value: 1 <= value.rank <= 4)
        if x is None:
            return None
        amounts = [(0, 0)] * (x.rank - 1) + [self.choose((0, 0), (1, 1), (0, 2))]
        return self.build.pad(x, pads=tuple(amounts), mode="constant", value=self.choose(0, 1.0))

    # -- reductions, products ------------------------------------------------------------------------------------------

    def reduce(self) -> Any:
        x = self.any(lambda value: value.rank > 1)
        if x is None:
            return None
        dims = tuple(sorted(self.draw(st.sets(st.integers(0, x.rank - 1), min_size=1, max_size=2))))
        return self.build(self.choose(*REDUCTIONS), x, dims=dims, keepdim=self.choose(True, False))

    def softmax(self) -> Any:
        x = self.any(lambda value: value.rank > 0)
        return None if x is None else self.build.softmax(x, dim=self.draw(st.integers(0, x.rank - 1)))

    def product(self) -> Any:
        x = self.any(lambda value: value.rank > 0 and isinstance(value.shape[-1], int))
        if x is None:
            return None
        size, out = int(x.shape[-1]), self.choose(2, 4)
        if self.choose(True, False):
            return self.build.linear(x, self.weight(out, size), self.weight(out) if self.choose(True, False) else None)
        return self.build.matmul(x, self.build.permute(self.weight(out, size), dims=(1, 0)))

    def flattened(self) -> Any:
        """Images as another framework orders them, into a linear map."""
        x = self.any(lambda value: value.rank == 4 and all(isinstance(s, int) for s in value.shape[1:]))
        if x is None:
            return None
        y = self.build.permute(x, dims=(0, 2, 3, 1))
        size = product(y.shape[1:])
        return self.build.linear(self.build.reshape(y, shape=(x.shape[0], size)), self.weight(3, int(size)))

    def convolution(self) -> Any:
        """A convolution in inference, with a batch norm, whose padding is zero."""
        x = self.any(lambda value: value.rank == 4 and all(isinstance(s, int) for s in value.shape[1:]))
        if x is None:
            return None
        channels, out = int(x.shape[1]), self.choose(2, 3)
        bias = self.weight(out) if self.choose(True, False) else None
        y = self.build.conv(x, self.weight(out, channels, 1, 3), bias, stride=(1, 1), padding=(0, 1), dilation=(1, 1))
        gain, shift, mean = self.weight(out), self.weight(out), self.weight(out)
        variance = self.build.parameter(self.build.unique("p"), self.tensor(out).abs() + 0.5)
        return self.build.batch_norm(y, gain, shift, mean, variance)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def pair(self) -> Any:
        """Two steps in a row that rules know."""
        first, second = self.choose(*PAIRS)
        made = getattr(self, first)()
        made = made[0] if isinstance(made, list) else made
        if made is None:
            return None
        before, self.values = self.values, [made]
        found = getattr(self, second)()
        self.values = before
        return found

    def meeting(self) -> Any:
        """Two operands, permuted alike."""
        x = self.any(lambda value: value.rank > 1)
        if x is None:
            return None
        y = self.any(lambda value: value.shape == x.shape)
        dims = tuple(self.draw(st.permutations(range(x.rank))))
        return self.build(self.choose(*BINARY), *[self.build.permute(v, dims=dims) for v in (x, y)])

    def again(self) -> Any:
        """A node once more."""
        x = self.any(lambda value: value.producer is not None and not value.producer.regions)
        if x is None or x.producer is None:
            return None
        node = x.producer
        found = self.build(node.op, *node.inputs, **node.attributes)
        return found

    def table(self) -> Any:
        """Constants that are computed, and a copy of one."""
        tensor = self.tensor(4)
        x, y = self.build.constant(tensor), self.build.constant(tensor.clone())
        return self.build.mul(self.build.tanh(x), self.build.add(y, self.build.full(shape=(4,), value=1.0, dtype=torch.float64)))  # fmt: skip  # noqa: E501

    def branch(self) -> Any:
        """A choice: decided, undecided, or between equal branches; regions may hold regions."""
        x, y = self.any(), self.any()
        if self.depth > 1 or x is None or y is None:
            return None
        regions: list[Graph] = []
        steps = self.draw(
            st.lists(st.sampled_from(("unary", "number", "undone", "clamp", "table", "branch")), max_size=3)
        )
        for name in ("then", "else"):
            inner = Drawn(self.draw, self.build.region(Graph(name)), self.depth + 1)
            inner.values = [inner.build.input(self.build.unique(v.name), v.shape, v.dtype) for v in (x, y)]
            result = inner.values[0]
            for step in steps:
                found = getattr(inner, step)()
                if found is not None and found.shape == x.shape:
                    inner.values = [found, inner.values[-1]]
                    result = found
            if result.producer is None:
                result = inner.build.neg(result)
            inner.build.graph.outputs = [result]
            regions.append(inner.build.graph)
        predicate = self.choose(True, False, self.build.constant(torch.tensor(True)), None)
        if predicate is None:
            predicate = self.build.gt(self.build.sum(x, dims=None), 0.0)
        return self.build("cond", predicate, x, y, regions=regions, results=[(x.shape, x.dtype)])


PAIRS = (
    ("reshape", "reshape"), ("unsqueeze", "permute"), ("permute", "unsqueeze"), ("unsqueeze", "squeeze"),
    ("reshape", "unsqueeze"), ("slice", "slice"), ("concat", "slice"), ("concat", "split"), ("concat", "select"),
    ("expand", "expand"), ("concat", "concat"), ("permute", "reduce"), ("slice", "concat"),
)  # fmt: skip
INNER_STEPS = ("unary", "number", "undone", "clamp", "table", "branch")
STEPS = (
    "unary", "undone", "number", "clamp", "binary", "scaled", "cast", "permute", "there_and_back", "reshape",
    "unsqueeze", "squeeze", "expand", "slice", "split", "concat", "select", "stack", "pad", "reduce", "softmax",
    "product", "flattened", "convolution", "again", "table", "branch", "binary", "permute", "slice", "concat",
    "pair", "pair", "meeting",
)  # fmt: skip


@st.composite
def graphs(draw: Callable[[Any], Any]) -> Graph:
    """A graph of an image f64[batch,3,2,4] and rows f64[batch,4], with one to three outputs and some dead code."""
    graph = Graph("random")
    graph.symbols[BATCH] = (1, None)
    drawn = Drawn(draw, Builder(graph))
    drawn.values = [drawn.build.input("image", (BATCH, 3, 2, 4), torch.float64),
                    drawn.build.input("rows", (BATCH, 4), torch.float64)]  # fmt: skip
    for _ in range(draw(st.integers(2, 14))):
        drawn.step()
    graph.outputs = _outputs(draw, drawn)
    return graph


def _outputs(draw: Callable[[Any], Any], drawn: Drawn) -> list[Any]:
    """Up to three values that nothing reads, and the sum of most others: little is dead."""
    build = drawn.build
    open_values = list(dict.fromkeys(v for v in drawn.values if v.producer is not None and not v.uses))
    open_values = open_values or [build.relu(drawn.values[0])]
    count = draw(st.integers(1, min(3, len(open_values))))
    outputs, rest = open_values[-count:], open_values[: -count - draw(st.integers(0, 1))]
    if rest:
        total = build.sum(rest[0], dims=None)
        for value in rest[1:]:
            total = build.add(total, build.sum(value, dims=None))
        outputs.append(total)
    return outputs
