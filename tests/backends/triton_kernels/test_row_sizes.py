"""Tiles of kernels without products: of a table, or smaller where entries have addresses of their own."""

import importlib.util
from typing import Any

import pytest
import torch

import kernel_forms
from kernel_forms import Form, form_graph
from regauge.backends.triton_kernels.compile import ARCHITECTURES, compile_kernel
from regauge.backends.triton_kernels.configs import config_of
from regauge.backends.triton_kernels.kernel import Kernel, Launch, case_of, launch_of, triton_kernel
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.tracing import trace

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def made(name: str, columns: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Kernel, dict[Dim, int]]:
    graph = form_graph(name, dtype, 4096, columns)
    kernel = triton_kernel(trace(graph.nodes, graph.outputs), name)  # type: ignore[arg-type]
    return kernel, {dim: int(dim.size) for dim in kernel.region.sized}


def start_of(name: str, columns: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Launch, Any]:
    """How a kernel is launched, and what the table says."""
    kernel, sizes = made(name, columns, dtype)
    source = kernel.source()
    config = config_of(case_of(source, sizes), "sm_80")
    return launch_of(source, sizes, config, "sm_80"), config


@pytest.mark.parametrize("name", ["swiglu", "broadcast", "turned", "rotary_inside", "joined", "averaged"])
def test_entries_that_lie_side_by_side_have_the_tile_of_the_table(name: str) -> None:
    start, config = start_of(name, 4096)
    assert start.constants.get("ROWS", 1) * start.constants["BLOCK"] == config.tile["ENTRIES"]
    assert start.warps == config.warps


def test_tensors_that_are_read_one_by_one_leave_a_thread_fewer_entries() -> None:
    start, config = start_of("shifted", 4096)  # every other entry, forwards and backwards, of four places
    assert (start.constants["BLOCK"], config.tile["ENTRIES"], start.warps) == (512, 1024, 4)


def two_transposed(f: Form, rows: int, columns: int) -> Any:
    b = f.build
    turned = (b.permute(f.x(columns, rows), dims=(1, 0)) for _ in range(2))
    return b.mul(*map(b.tanh, turned))


def four_transposed(f: Form, rows: int, columns: int) -> Any:
    b = f.build
    return b.mul(two_transposed(f, rows, columns), two_transposed(f, rows, columns))


def test_each_of_these_tensors_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in (two_transposed, four_transposed):
        monkeypatch.setitem(kernel_forms.FORMS, form.__name__, form)
    assert [start_of(name, 64)[0].constants["BLOCK"] for name in ("two_transposed", "four_transposed")] == [64, 64]
    wide = [start_of(name, 2048)[0].constants["BLOCK"] for name in ("two_transposed", "four_transposed")]
    assert wide == [1024, 512]


def test_rows_over_several_axes_have_threads_with_more_registers() -> None:
    for name, columns, warps in (
        ("layer_norm", 16384, 32),
        ("group_norm_silu", 4096, 16),
        ("group_norm_silu", 2048, 16),
    ):
        start, config = start_of(name, columns)
        assert start.warps == warps <= config.warps and start.constants["ROWS"] == 1


def test_rows_that_no_threads_have_the_registers_for_are_reduced_in_a_loop() -> None:
    forms = {}
    for dtype in (torch.bfloat16, torch.float32):
        for columns in (2048, 4096):
            kernel, sizes = made("group_norm_silu", columns, dtype)  # three channels are a row
            forms[dtype, columns] = kernel.form_for(sizes)
    assert forms == {
        (torch.bfloat16, 2048): "rows",
        (torch.bfloat16, 4096): "rows",
        (torch.float32, 2048): "rows",
        (torch.float32, 4096): "looped",
    }
    kernel, sizes = made("layer_norm", 16384, torch.float32)
    assert kernel.form_for(sizes) == "rows"


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["shifted", "group_norm_silu"])
def test_what_lies_apart_spills_nothing(name: str, architecture: str, dtype: torch.dtype) -> None:
    """With Triton 3.6, 3.8 or 3.9 they did."""
    kernel, sizes = made(name, 4096, dtype)
    assert compile_kernel(kernel.source(kernel.form_for(sizes)), sizes, architecture).spilled == 0
