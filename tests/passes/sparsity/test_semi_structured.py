"""2:4 weights as sparse kernels take them: nothing is lost, and what they do not take is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

import regauge
from regauge.ir.errors import PassError
from regauge.passes.sparsity.patterns import NofM
from regauge.passes.sparsity.semi_structured import kernel_misfit, kernel_operands, pack, unpack, use_sparse_kernels


def weight_24(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (weight * NofM(2, 4).mask(weight.abs(), 0)).to(dtype)


@given(rows=st.integers(1, 9), sixteens=st.integers(1, 5), seed=st.integers(0, 99), emptied=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_packed_weights_unpack_to_what_they_were(rows: int, sixteens: int, seed: int, emptied: float) -> None:
    weight = weight_24(rows, 16 * sixteens, seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < emptied] = 0
    packed = pack(weight)
    assert packed.values.shape == (rows, 8 * sixteens) and packed.places.shape == (rows, sixteens)
    assert packed.places.dtype == torch.int16
    assert torch.equal(unpack(packed), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_operands_are_the_same_values_in_the_order_of_the_kernel(dtype: torch.dtype) -> None:
    weight = weight_24(64, 128, dtype=dtype)
    weight[weight == 0] = 0  # no negative zeros
    packed, operands = pack(weight), kernel_operands(weight)
    assert torch.equal(operands.values, packed.values)
    assert torch.equal(operands.places.flatten().sort().values, packed.places.flatten().sort().values)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(*operands), weight)


def test_what_kernels_do_not_take_is_told() -> None:
    assert kernel_misfit(weight_24(32, 64)) is None
    assert kernel_misfit(torch.ones(32, 64).half()) == "it is not 2:4"
    assert kernel_misfit(weight_24(32, 64).float()) == "it is neither float16 nor bfloat16"
    assert kernel_misfit(weight_24(16, 64)) == "its sizes are no multiples of 32 and 64"
    with pytest.raises(PassError, match="is not 2:4: make it so"):
        pack(torch.ones(4, 16))
    with pytest.raises(PassError, match="cannot run on sparse tensor cores: it is not 2:4"):
        kernel_operands(torch.ones(32, 64).half())


def test_layers_of_an_emitted_network_are_legal_for_the_kernels() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 10))
    graph = regauge.capture(model, (torch.randn(2, 64),))
    module = regauge.optimize(graph, "sparsify{exclude=[3.*]}").to_torch().half()
    fitting = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and kernel_misfit(m.weight) is None]
    assert fitting == ["0", "2"]
    for layer in (module.get_submodule(name) for name in fitting):
        assert torch.equal(unpack(pack(layer.weight.detach())), layer.weight)
    assert use_sparse_kernels(nn.Sequential(module.get_submodule("3"))) == {
        "0": "its sizes are no multiples of 32 and 64"
    }
