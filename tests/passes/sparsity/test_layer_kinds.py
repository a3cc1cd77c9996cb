"""Masks run along the axis that a weight shares with its input, however the layer stores it; shapes are drawn."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regauge
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph

CONTRACTED = {"linear": 1, "matmul": 0, "conv": 1}
PATTERNS = ["2:4", "1:4", "3:8", "unstructured", "block,block=2x4"]


def one_layer(kind: str, inputs: int, outputs: int, kernel: tuple[int, ...]) -> tuple[Graph, torch.Tensor]:
    draw = torch.Generator().manual_seed(inputs * outputs)
    shape = {"linear": (outputs, inputs), "matmul": (inputs, outputs), "conv": (outputs, inputs, *kernel)}[kind]
    places = tuple(size + 2 for size in kernel) if kind == "conv" else ()
    graph = Graph(kind)
    build = Builder(graph)
    x = build.input("x", (6, inputs, *places) if places else (6, 5, inputs), torch.float32)
    weight = build.parameter("weight", torch.randn(shape, generator=draw))
    if kind == "matmul":
        graph.outputs = [build.matmul(x, weight)]
    else:
        bias = build.parameter("bias", torch.randn(outputs, generator=draw))
        graph.outputs = [getattr(build, kind)(x, weight, bias)]
    return graph, torch.randn([int(size) for size in x.shape], generator=draw)


def obeys(weight: torch.Tensor, axis: int, pattern: str) -> bool:
    """The pattern in the weight as it is stored, told without any code of the pass."""
    kept = (weight != 0).movedim(axis, -1)  # [outputs, places..., inputs]
    if ":" in pattern:
        keep, of = map(int, pattern.split(":"))
        return bool((kept.unflatten(-1, (-1, of)).sum(-1) <= keep).all())
    share = float(kept.float().mean())
    if pattern == "unstructured":
        return abs(share - 0.5) < 0.02
    blocks = kept.unflatten(-1, (-1, 4)).unflatten(0, (-1, 2)).movedim(1, -1).flatten(-2)
    return bool((blocks.all(-1) == blocks.any(-1)).all()) and abs(share - 0.5) < 0.1


@given(
    kind=st.sampled_from(list(CONTRACTED)),
    pattern=st.sampled_from(PATTERNS),
    inputs=st.integers(1, 3).map(lambda n: 8 * n),
    outputs=st.integers(2, 6).map(lambda n: 2 * n),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    with_data=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_stored_weight_obeys_the_pattern(
    kind: str, pattern: str, inputs: int, outputs: int, kernel: tuple[int, ...], with_data: bool
) -> None:
    graph, x = one_layer(kind, inputs, outputs, kernel)
    sparse = regauge.optimize(graph, f"sparsify{{pattern={pattern}}}", data=[x] if with_data else None)
    before, after = graph.parameters["weight"].tensor, sparse.parameters["weight"].tensor
    assert after.shape == before.shape and not torch.equal(before, after)
    assert obeys(after, CONTRACTED[kind], pattern)
    if not with_data:
        assert torch.equal(after[after != 0], before[after != 0])
