"""Linear layers on torch's sparse kernels: the same results where there is one, and a reason where there is none."""

import copy

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.storage.sparse_layouts import Blocks, Csr, Layout, Masked, NofM
from regauge.passes.nm_mask import nm_mask
from regauge.passes.sparsity.kernels import use_sparse_kernels


def weight_24(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return (weight * nm_mask(weight.abs(), 1, 2, 4)).half()


def test_what_kernels_do_not_take_is_told() -> None:
    misfit = NofM(2, 4).kernel_misfit
    assert misfit(weight_24(32, 64)) is None
    assert misfit(torch.ones(32, 64).half()) == "it is not 2:4: make it so by sparsify{pattern=2:4}"
    assert misfit(weight_24(32, 64).float()) == "it is neither float16 nor bfloat16"
    assert misfit(weight_24(16, 64)) == "its sizes are no multiples of 32 and 64"
    assert NofM(1, 4).kernel_misfit(weight_24(32, 64)) == "torch has kernels for 2:4 only"
    assert Masked().kernel_misfit(weight_24(32, 64)) == "torch has no kernel for it"


def test_layers_of_an_emitted_network_are_legal_for_the_kernels() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 10))
    graph = regauge.capture(model, (torch.randn(2, 64),))
    module = regauge.optimize(graph, "sparsify{exclude=[3.*]}").to_torch().half()
    layout = NofM(2, 4)
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    fitting = [name for name, layer in layers.items() if layout.kernel_misfit(layer.weight) is None]
    assert fitting == ["0", "2"]
    for name in fitting:
        assert torch.equal(layout.pack(layers[name].weight).unpack(), layers[name].weight)
    reason = "its sizes are no multiples of 32 and 64"
    assert regauge.sparse.use_sparse_kernels(nn.Sequential(layers["3"])) == {"0": reason}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [Csr(), Blocks(4, 4)], ids=lambda layout: layout.name)
@pytest.mark.parametrize("bias", [True, False])
def test_layers_compute_the_same_on_a_cpu(layout: Layout, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=bias), nn.GELU(), nn.Linear(32, 10, bias=bias))
    graph = regauge.capture(model, (torch.randn(2, 16),))
    module = regauge.optimize(graph, "sparsify{pattern=block,block=4x4,ratio=0.75,exclude=[2.*]}").to_torch()
    sparse = copy.deepcopy(module)
    left = use_sparse_kernels(sparse, [NofM(2, 4), layout])
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(sparse(x), module(x))
    layers = [m for m in sparse.modules() if isinstance(m, nn.Linear)]
    assert layers[0].weight.layout is not torch.strided
    if isinstance(layout, Blocks):
        why = "2:4: it is neither float16 nor bfloat16; 4x4: its sizes are no multiples of 4 and 4"
        assert left == {"2": why} and layers[1].weight.layout is torch.strided
    else:
        assert not left
    assert use_sparse_kernels(sparse, [layout]).keys() == left.keys(), "what is sparse already stays"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_a_kernel_that_torch_does_not_have_here_is_told() -> None:
    layer = nn.Linear(64, 32).half()
    with torch.no_grad():
        layer.weight.copy_(weight_24(32, 64))
    (reason,) = use_sparse_kernels(nn.Sequential(layer)).values()
    assert reason.startswith("torch does not run it on cpu: ") and layer.weight.layout is torch.strided
