"""Kernels of gradients in Triton's interpreter: test_gradients.py runs these tests in a process of their own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import triton_interpreter
from kernel_contract import drawn
from kernel_forms import form_graph
from regauge.backends.to_torch import to_torch
from regauge.backends.torch_module.kernels import KernelOperator, kernel_operator
from regauge.backends.triton_kernels import attention_sizes
from regauge.backends.triton_kernels import kernel as kernels
from regauge.backends.triton_kernels.configs import Config
from regauge.ir.edit import Builder
from regauge.ir.fusion import attention_gradients
from regauge.ir.fusion.fuse import fuse
from regauge.ir.fusion.fused import body_of, canonical
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph

triton_interpreter.repair()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("swiglu", "geglu", "masked_softmax", "log_softmax", "layer_norm", "gated_rms_norm", "add_rms_norm",
         "group_norm_silu", "turned", "rotary_inside", "cross_entropy", "smooth_cross_entropy")  # fmt: skip


def in_turn(names: Sequence[str]) -> list[Any]:
    """By day each name in one of the types in turn, at night in all of them."""
    return [
        pytest.param(name, dtype, marks=[] if kind == place % len(DTYPES) else [pytest.mark.nightly])
        for place, name in enumerate(names)
        for kind, dtype in enumerate(DTYPES)
    ]


def by_torch(
    made: KernelOperator, tensors: list[torch.Tensor], seeds: list[torch.Tensor], of: list[int]
) -> tuple[torch.Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_(place in of) for place, tensor in enumerate(tensors)]
    found = made.body(*leaves)
    return torch.autograd.grad(found, [leaves[place] for place in of], seeds)


def drawn_operator(name: str, dtype: torch.dtype) -> tuple[KernelOperator, list[torch.Tensor], list[torch.Tensor]]:
    """The operator of a form, what it reads, and gradients of its results."""
    return operator_of(form_graph(name, dtype))


def operator_of(graph: Graph) -> tuple[KernelOperator, list[torch.Tensor], list[torch.Tensor]]:
    tensors = drawn(graph)
    node = fuse(Builder(graph), trace(graph.nodes, graph.outputs), "fused")  # type: ignore[arg-type]
    body = canonical(body_of(node))
    made = kernel_operator(body, "fused", to_torch(body))
    read = [tensors[value] for value in node.inputs]  # type: ignore[index]
    generator = torch.Generator().manual_seed(1)
    return made, read, [torch.randn([*v.shape], generator=generator).to(v.dtype) for v in made.writes]


@pytest.mark.parametrize(("name", "dtype"), in_turn(NAMES))
def test_gradients_keep_the_contract(name: str, dtype: torch.dtype) -> None:
    made, read, seeds = drawn_operator(name, dtype)
    wide = [[t.double() if t.is_floating_point() else t for t in some] for some in (read, seeds)]
    assert made.backward
    for one, operator in made.backward:
        of = [places[0] for places in one.of]
        true, eager = by_torch(made, *wide, of), by_torch(made, read, seeds, of)
        given = [read[place] for place in one.reads] + [seeds[place] for place in one.given]
        for form in operator.kernel.forms:
            found = operator.kernel.launch(dict(zip(operator.reads, given, strict=True)), form)
            for value, exact, other in zip(operator.writes, true, eager, strict=True):
                check(found[value], exact, other)


@pytest.mark.parametrize(("name", "dtype"), in_turn(["layer_norm", "gated_rms_norm", "add_rms_norm"]))
def test_programs_add_up_what_rows_share(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs go through five or ten rows, one after the other."""
    monkeypatch.setattr(kernels, "MOST_SUMMED", 3)
    monkeypatch.setattr(kernels, "config_for", lambda *_: Config({"ENTRIES": 64}, warps=4, stages=2))
    made, read, seeds = drawn_operator(name, dtype)
    wide = [[t.double() if t.is_floating_point() else t for t in some] for some in (read, seeds)]
    ((one, operator),) = made.backward
    assert operator.kernel.forms == ("summed",) and "adds up" in operator.kernel.source().text
    given = [read[place] for place in one.reads] + [seeds[place] for place in one.given]
    found = operator.kernel.launch(dict(zip(operator.reads, given, strict=True)))
    of = [(places[0], value) for places, value in zip(one.of, operator.writes, strict=True) if places]
    true, eager = (by_torch(made, *some, [place for place, _ in of]) for some in (wide, (read, seeds)))
    for (_, value), exact, other in zip(of, true, eager, strict=True):
        check(found[value], exact, other)


ATTENTION = (
    "causal_attention", "later_causal_attention", "masked_attention", "capped_attention", "latent_attention",
    "written_out_attention", "position_bias_attention", "sloped_attention",
)  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), in_turn(ATTENTION))
def test_gradients_of_attention_keep_the_contract(name: str, dtype: torch.dtype) -> None:
    check_attention(*drawn_operator(name, dtype))


def check_attention(made: KernelOperator, read: list[torch.Tensor], seeds: list[torch.Tensor]) -> None:
    assert made.backward and not made.gradients.left
    sums: dict[int, torch.Tensor] = {}  # of latents that are keys and values, too
    for one, operator in made.backward:
        given = [read[place] for place in one.reads] + seeds
        found = operator.kernel.launch(dict(zip(operator.reads, given, strict=True)))
        for (place,), value in zip(one.of, operator.writes, strict=True):
            sums[place] = sums[place] + found[value] if place in sums else found[value]
    wide = [[t.double() if t.is_floating_point() else t for t in some] for some in (read, seeds)]
    true, eager = (by_torch(made, *some, [*sums]) for some in (wide, (read, seeds)))
    for gradient, exact, other in zip(sums.values(), true, eager, strict=True):
        check(gradient, exact, other)


WIDE = {
    "causal": (320, 320), "more_numbers_than_a_block": (576, 520), "masked": (320, 264), "biased": (320, 272),
    "capped": (264, 48), "sharpened": (40, 320),
}  # fmt: skip
"""Numbers of heads and of values, of which at least one are more than a program holds."""


def shared_attention(kind: str, dtype: torch.dtype, head: int, columns: int) -> Graph:
    """Two heads of queries share one of keys and values; of several tiles of queries and of places the last are cut."""
    rows, places = 17, 33
    graph = Graph(kind)
    build = Builder(graph)
    q, k, v = (
        build.input(name, (2, heads, size, width), dtype)
        for name, heads, size, width in (("q", 2, rows, head), ("k", 1, places, head), ("v", 1, places, columns))
    )
    scale = head**-0.5
    if kind == "masked":
        mask = build.input("mask", (rows, places), torch.bool)
        y = build.attention(q, k, v, mask, scale=scale, enable_gqa=True)
    elif kind == "biased":
        bias = build.input("bias", (2, rows, places), dtype)
        y = build.attention(q, k, v, bias, scale=scale, is_causal=True, lower_right=True, enable_gqa=True)
    elif kind == "capped":
        y = build.capped_attention(q, k, v, build.input("bias", (rows, places), dtype), scale=scale, softcap=5.0)
    elif kind == "sharpened":
        scores = build.mul(build.matmul(q, build.permute(k, dims=(0, 1, 3, 2))), scale)
        y = build.matmul(build.softmax(build.mul(scores, build.input("gain", (2, 1, 1), dtype)), dim=3), v)
    else:
        y = build.attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)
    graph.outputs = [y]
    return graph


@pytest.mark.parametrize(("kind", "dtype"), in_turn([*WIDE]))
def test_gradients_of_wide_heads_keep_the_contract(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they would not gain: each program reads what leads to its part of a gradient again."""
    monkeypatch.setattr(attention_gradients, "loss_of", lambda *_: "")
    made, read, seeds = operator_of(shared_attention(kind, dtype, *WIDE[kind]))
    _, operator = made.backward[0]
    assert operator.kernel.source().then.then.then.form == "of_values"
    check_attention(made, read, seeds)


def test_each_head_of_queries_that_share_keys_may_have_a_scale() -> None:
    check_attention(*operator_of(shared_attention("sharpened", torch.float32, 40, 24)))


@pytest.mark.parametrize("name", ["capped_attention", "position_bias_attention", "sloped_attention"])
def test_programs_share_what_a_bias_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone for a tile each program gives the same as several, and each time the same."""
    made, read, seeds = drawn_operator(name, torch.float32)
    parts: list[list[torch.Tensor]] = []
    for busy in (256, 256, 1):
        monkeypatch.setattr(attention_sizes, "BUSY", busy)
        found: list[torch.Tensor] = []
        for one, operator in made.backward[1:]:
            given = [read[place] for place in one.reads] + seeds
            found += operator.kernel.launch(dict(zip(operator.reads, given, strict=True))).values()
        parts.append(found)
    assert parts[0] and all(map(torch.equal, parts[0], parts[1]))
    for own, other in zip(parts[0], parts[2], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def check(found: torch.Tensor, true: torch.Tensor, eager: torch.Tensor) -> None:
    """The contract of tests/kernel_contract.py."""
    scale = true.abs().max()
    error, allowed = (float((tensor.double() - true).abs().max() / scale) for tensor in (found, eager))
    floor = max(torch.finfo(found.dtype).eps, 16 * torch.finfo(torch.float32).eps)
    assert found.dtype == eager.dtype and error <= max(2 * allowed, floor)
