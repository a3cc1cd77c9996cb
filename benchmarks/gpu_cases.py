"""What benchmarks/gpu.py times: small torch functions, of which Regauge's planner makes kernels. One line per case."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from regauge.backends.triton_kernels.sparsity import dense_of, stored
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph

Function = Callable[..., Any]
SMALL, LEAST = 256, 5
"""In the interpreter sizes are so many times smaller, but not smaller than the least."""


@dataclass(frozen=True)
class Case:
    """A function of tensors of these shapes; ``liger`` names Liger's kernel for it, ``module:name``, where it has one.

    ``types`` says of which tensors the type is another than that of the run: integers are drawn from -7 to 7. Where the
    second tensor has a ``pattern`` of zeros, Regauge reads what is stored of it, the two tensors behind the last one.
    """

    name: str
    function: Function
    shapes: tuple[tuple[int, ...], ...]
    liger: str = ""
    arguments: tuple[Any, ...] = ()  # of Liger, behind the tensors
    types: Mapping[int, torch.dtype] = field(default_factory=dict)
    pattern: tuple[int, int] | None = None  # of the second tensor so many of so many neighbours are not zero
    trains: bool = False  # what is timed is a call and the gradients of what it reads

    @property
    def call(self) -> Function:
        return with_gradients(self.function) if self.trains else self.function

    def of(self, size: Callable[[int], int]) -> list[tuple[int, ...]]:
        return [tuple(size(extent) for extent in shape) for shape in self.shapes]

    def peer(self) -> Function | None:
        """Liger's function; None where it has none, or is not installed."""
        if not self.liger:
            return None
        module, _, name = self.liger.partition(":")
        try:
            function = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply
        except (ImportError, AttributeError):
            return None
        return lambda *tensors: function(*tensors, *self.arguments)


def with_gradients(function: Function) -> Function:
    """The gradients of half of the squares of what a function gives."""

    def call(*tensors: Any) -> Any:
        leaves = [tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors]
        with torch.enable_grad():
            found = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(found, wanted, found.detach(), allow_unused=True)
        return tuple(gradient for gradient in gradients if gradient is not None)  # labels in double precision have none

    return call


def small(extent: int) -> int:
    return max(min(extent, LEAST), extent // SMALL)


def inputs(
    case: Case, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Random tensors; what looks like a weight is scaled by the square root of its columns, so that sums stay small."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for place, shape in enumerate(shapes):
        kind = case.types.get(place, dtype)
        if not kind.is_floating_point:
            made.append(torch.randint(-7, 8, shape, generator=generator, device=device, dtype=kind))
            continue
        tensor = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        made.append((tensor * shape[-1] ** -0.5 if place and len(shape) == 2 else tensor).to(kind))
    if case.pattern is not None:
        keep, of = case.pattern
        groups = made[1].view(made[1].shape[0], -1, of)
        groups.scatter_(2, groups.abs().argsort(2)[:, :, : of - keep], 0)
        made += (part.to(device) for part in stored(made[1].cpu(), keep, of))
    return made


def sparse_graph(tensors: Sequence[torch.Tensor], pattern: tuple[int, int]) -> Graph:
    """The linear map of a weight with a pattern of zeros, as kernels read it."""
    build = Builder(Graph("sparse"))
    x, _, values, mask = (build.input(name, t.shape, t.dtype) for name, t in zip("xwvm", tensors, strict=True))
    build.graph.outputs = [build.linear(x, dense_of(build, values, mask, *pattern))]
    return build.graph


def swiglu(gate: Any, up: Any) -> Any:
    return F.silu(gate) * up


def geglu(gate: Any, up: Any) -> Any:
    return F.gelu(gate) * up


def softmax(x: Any) -> Any:
    return F.softmax(x, -1)


def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-6)


def rms_norm(x: Any, weight: Any) -> Any:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def add_rms_norm(x: Any, residual: Any, weight: Any) -> Any:
    stream = x + residual
    return stream, F.rms_norm(stream, weight.shape, weight, 1e-6)


def rotary(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def scores(q: Any, k: Any) -> Any:
    return F.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)


def group_norm(x: Any, weight: Any, bias: Any) -> Any:
    return F.silu(F.group_norm(x, 5, weight, bias))


def dense(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
    return F.gelu(F.linear(x, weight, bias)) + residual


def gated(x: Any, gate: Any, up: Any) -> Any:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def gated_down(gate: Any, down: Any, up: Any) -> Any:
    return F.linear(F.silu(gate) * up, down)


def low_rank(x: Any, down: Any, up: Any) -> Any:
    return F.linear(F.linear(x, down), up)


def attention(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v)


def causal_attention(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_to_turned_latents(q: Any, latents: Any, weight: Any, cos: Any, sin: Any, v: Any) -> Any:
    """Keys of all heads come from the same latents (Palu), and are turned by their positions."""
    keys = latents[:, None] @ weight.transpose(-1, -2)
    half = keys.shape[-1] // 2
    keys = keys * cos + torch.cat([-keys[..., half:], keys[..., :half]], -1) * sin
    return F.scaled_dot_product_attention(q, keys, v, enable_gqa=True)


def attention_to_latents_of_values(q: Any, k: Any, latents: Any, weight: Any) -> Any:
    """Values of all heads come from the same latents (Palu), which are mixed in place of them."""
    return F.scaled_dot_product_attention(q, k, latents[:, None] @ weight, enable_gqa=True)


def cross_entropy(x: Any, labels: Any) -> Any:
    return F.cross_entropy(x, labels.abs().long(), reduction="none")


def linear(x: Any, weight: Any, *_: Any) -> Any:
    return F.linear(x, weight)


def attention_to_eight_bits(q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any) -> Any:
    return F.scaled_dot_product_attention(q, k.to(q.dtype) * k_scale, v.to(q.dtype) * v_scale)


def eight_bits(x: Any, codes: Any, scale: Any) -> Any:
    return F.linear(x, codes.to(x.dtype) * scale[:, None])


T, D, H, V = 16384, 4096, 11008, 131072  # tokens, width, hidden units, a long row

CASES = [
    Case("silu(gate) * up", swiglu, ((T, H), (T, H)), "swiglu:LigerSiLUMulFunction"),
    Case("gelu(gate) * up", geglu, ((T, H), (T, H))),
    Case("softmax", softmax, ((T, D),), "softmax:LigerSoftmaxFunction"),
    Case("layer norm", layer_norm, ((T, D), (D,), (D,)), "layer_norm:LigerLayerNormFunction", (1e-6,)),
    Case("RMS norm", rms_norm, ((T, D), (D,)), "rms_norm:LigerRMSNormFunction", (1e-6,)),
    Case("residual + RMS norm", add_rms_norm, ((T, D), (T, D), (D,))),
    Case("softmax of long rows", softmax, ((2048, V),), "softmax:LigerSoftmaxFunction"),
    Case("rotary code", rotary, ((8, 32, 2048, 128), (2048, 128), (2048, 128))),
    Case("group norm + silu", group_norm, ((16, 1280, 4096), (1280,), (1280,))),
    *(Case(f"linear + bias + gelu + residual, M={m}", dense, ((m, D), (H, D), (H,), (m, H)))
      for m in (1, 16, 64, 256, D, T)),
    Case("gate and up, silu, mul", gated, ((D, D), (H, D), (H, D))),
    Case("silu, mul, down", gated_down, ((D, H), (D, H), (D, H))),
    Case("scores, scaled, softmax", scores, ((32, 2048, 128), (32, 2048, 128))),
    Case("causal attention", causal_attention, ((4, 32, 2048, 128),) * 3),
    Case("attention of one query", attention, ((8, 32, 1, 128), (8, 32, 8192, 128), (8, 32, 8192, 128))),
    Case("attention of wide heads", causal_attention, ((4, 8, 2048, 512),) * 3),
    Case("attention of one query to turned latents", attention_to_turned_latents,
         ((8, 32, 1, 128), (8, 8192, 256), (8, 128, 256), (8192, 128), (8192, 128), (8, 8, 8192, 128))),
    Case("attention of one query to latents of values", attention_to_latents_of_values,
         ((8, 32, 1, 128), (8, 8, 8192, 128), (8, 8192, 256), (8, 256, 128))),
    Case("cross entropy", cross_entropy, ((4096, V), (4096,)), types={1: torch.int64}),
    Case("gradients of a layer norm", layer_norm, ((T, D), (D,), (D,)), trains=True),
    Case("gradients of a cross entropy", cross_entropy, ((4096, V), (4096,)), types={1: torch.int64}, trains=True),
    Case("gradients of causal attention", causal_attention, ((4, 32, 2048, 128),) * 3, trains=True),
    *(Case(f"attention to 8 bits, {m} queries", attention_to_eight_bits,
           ((8, 32, m, 128), *((8, 32, 8192, 128),) * 2, *((8, 32, 8192, 1),) * 2),
           types=dict.fromkeys((1, 2), torch.int8))
      for m in (1, 256)),
    *(Case(f"weight of 8 bits, M={m}", eight_bits, ((m, D), (H, D), (H,)), types={1: torch.int8})
      for m in (1, 16, 256)),
    *(Case(f"weight of 2:4, M={m}", linear, ((m, D), (H, D)), pattern=(2, 4)) for m in (1, 16, 64)),
    *(Case(f"low rank r={r}", low_rank, ((D, D), (r, D), (D, r))) for r in (64, 256, 1024)),
]  # fmt: skip
