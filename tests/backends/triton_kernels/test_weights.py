"""Weights laid out for kernels: what shares bytes stands for the same numbers."""

from typing import Any

import pytest
import torch

from regauge.backends.triton_kernels.weights import pack_weights
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value


def layer(bits: int, dtype: torch.dtype, turned: bool, group: int | None) -> Graph:
    """A layer of 24 outputs on 64 inputs, with a zero point where codes have no sign."""
    graph = Graph("g")
    build = Builder(graph)
    generator = torch.Generator().manual_seed(0)
    low = 0 if dtype == torch.uint8 else -(2 ** (bits - 1))
    scales: tuple[int, ...] = (24,) if group is None else (24, 64 // group)

    def laid(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t().contiguous() if turned and tensor.dim() == 2 else tensor

    q = build.parameter("q", laid(torch.randint(low, low + 2**bits, (24, 64), generator=generator).to(dtype)))
    scale = build.parameter("s", laid(torch.rand(scales, generator=generator)))
    zero: Value | None = None
    if dtype == torch.uint8:
        zero = build.parameter("z", laid(torch.randint(0, 2**bits, scales, generator=generator).to(dtype)), "buffer")
    axes: dict[str, Any] = {"axis": int(turned)} if group is None else {"axis": 1 - int(turned), "block_size": group}
    w = build.dequantize(q, scale, zero, bits=bits, **axes)
    x = build.input("x", (5, 64), torch.float32)
    graph.outputs = [build.matmul(x, w) if turned else build.linear(x, w)]
    return graph


@pytest.mark.parametrize("group", [None, 32, 16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_that_share_bytes_are_the_same_numbers(
    bits: int, dtype: torch.dtype, turned: bool, group: int | None
) -> None:
    graph, packed = (layer(bits, dtype, turned, group) for _ in range(2))
    assert pack_weights(packed, packed.nodes) == 1
    (stored,) = [p.tensor for p in packed.parameters.values() if p.name == "q_packed"]
    assert stored.numel() == 24 * 64 * (2 if bits == 2 else 4) // 8 and "q" not in packed.parameters
    x = torch.randn(5, 64)
    torch.testing.assert_close(packed.run(x), graph.run(x), rtol=0, atol=0)


def test_the_first_half_of_a_group_lies_in_the_lower_bits() -> None:
    graph = layer(4, torch.uint8, False, 32)
    codes = graph.parameters["q"].tensor.clone()
    pack_weights(graph, graph.nodes)
    stored = graph.parameters["q_packed"].tensor
    assert torch.equal(stored & 15, codes.reshape(24, 2, 2, 16)[:, :, 0])
    assert torch.equal(stored >> 4, codes.reshape(24, 2, 2, 16)[:, :, 1])


def test_what_others_read_and_whole_bytes_stay() -> None:
    graph = layer(8, torch.int8, False, None)
    assert pack_weights(graph, graph.nodes) == 0
    graph = layer(4, torch.uint8, False, 32)
    Builder(graph).identity(graph.parameters["q"])
    assert pack_weights(graph, graph.nodes) == 0
