"""What kernels promise: against double precision no more than twice the error of torch, node by node in the same type.

An error below one unit in the last place of the type of the result, or below sixteen of single precision, is none:
torch's own functions differ by as much. Errors are relative to the greatest entry of a result.
"""

from collections.abc import Mapping

import torch

from regauge.backends.triton_kernels.kernel import Form, triton_kernel
from regauge.backends.triton_kernels.source import Rounding
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Value

EXACT = {"add", "sub", "mul", "maximum", "minimum", "relu", "neg", "abs"}
"""Operators whose results are the same in every bit where each is rounded as in torch."""

Tensors = Mapping[Value, torch.Tensor]


def evaluated(graph: Graph, tensors: Tensors, dtype: torch.dtype | None = None) -> dict[Value, torch.Tensor]:
    """What torch computes node by node: in the types of the tensors, or with all floats as ``dtype``."""
    known = dict(tensors)
    if dtype is not None:
        known = {value: t.to(dtype) if t.is_floating_point() else t for value, t in known.items()}
    for node in graph.nodes:
        operands = [known[operand] if isinstance(operand, Value) else operand for operand in node.inputs]
        attributes = dict(node.attributes)
        if dtype is not None and node.op == "cast" and attributes["dtype"].is_floating_point:
            attributes["dtype"] = dtype
        known[node.output] = node.operator.evaluate(*operands, **attributes)
    return known


def drawn(graph: Graph, sizes: Mapping[object, int] | None = None, seed: int = 0, *, spread: bool = False) -> Tensors:
    """Tensors for inputs and weights; ``spread``: of every other entry of longer ones, axes from last to first."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[Value, torch.Tensor] = {}
    for value in graph.inputs:
        assert isinstance(value.dtype, torch.dtype)
        shape = [int((sizes or {}).get(size, size)) for size in value.shape]
        if spread:
            numbers = torch.randn([2 * size for size in reversed(shape)], generator=generator)
            numbers = numbers[tuple(slice(None, None, 2) for _ in shape)].permute(list(reversed(range(len(shape)))))
        else:
            numbers = torch.randn(shape, generator=generator)
        if value.dtype == torch.int64:  # numbers of entries
            numbers = (4 * numbers.abs()).floor() % 7
            tensors[value] = numbers.long()
        else:
            tensors[value] = _typed(numbers, value.dtype)
    tensors.update((parameter, parameter.tensor) for parameter in graph.parameters.values())
    return tensors


def _typed(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers as truth values, as integers over half of their range, or as floats."""
    if dtype == torch.bool:
        return numbers > 1
    if dtype.is_floating_point:
        return numbers.to(dtype)
    limits = torch.iinfo(dtype)
    return (numbers * limits.max / 4 + (limits.max + limits.min) / 2).clamp(limits.min, limits.max).to(dtype)


def check_kernel(
    graph: Graph,
    tensors: Tensors,
    rounding: Rounding = "fused",
    form: Form | None = None,
    region: Region | None = None,
) -> dict[str, float]:
    """Run a region of a graph, by default all of it, as a kernel and hold it to the contract; errors of results."""
    region = region or trace(graph.nodes, [value for value in graph.outputs if isinstance(value, Value)])
    eager, true = evaluated(graph, tensors), evaluated(graph, tensors, torch.float64)
    read = {load.value.value: eager[load.value.value] for load in region.loads}
    kernel = triton_kernel(region, "kernel", rounding=rounding)
    found = kernel.launch(read, form)
    errors = {}
    for value, tensor in found.items():
        assert tensor.shape == true[value].shape and tensor.dtype == value.dtype
        if rounding == "eager" and all(node.op in EXACT for node in graph.nodes):
            assert torch.equal(tensor, eager[value]), f"{value} differs from torch in some bit"
        errors[value.name] = error = _error(tensor, true[value])
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            _check_codes(*map(_places, (tensor, eager[value], true[value])))
            continue
        floor = max(torch.finfo(tensor.dtype).eps, 16 * torch.finfo(torch.float32).eps)
        most = max(2 * _error(eager[value], true[value]), floor)
        assert error <= most, f"{value}: error {error:.3g}, {most:.3g} allowed\n{kernel.source(form).text}"
    return errors


def _places(codes: torch.Tensor) -> torch.Tensor:
    """Integers as they are; floats of 8 bits as their places in the order of such floats."""
    if not codes.is_floating_point():
        return codes
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def _check_codes(found: torch.Tensor, eager: torch.Tensor, true: torch.Tensor) -> None:
    """Numbers next to the right one, and hardly more often than torch's: where what is rounded is half way between."""
    off, of_torch = ((one.int() - true.int()).abs() for one in (found, eager))
    assert int(off.max()) <= max(1, 2 * int(of_torch.max())), f"codes are off by {int(off.max())}"
    assert int((off > 0).sum()) <= max(2 * int((of_torch > 0).sum()), 1 + found.numel() // 100), "many codes are off"


def _error(found: torch.Tensor, true: torch.Tensor) -> float:
    if not true.numel():
        return 0.0
    wide, true = found.double(), true.double()
    same = (wide == true) | (wide.isnan() & true.isnan())
    scale = true[true.isfinite()].abs().max().clamp_min(1e-6) if bool(true.isfinite().any()) else 1.0
    return float(torch.where(same, 0.0, (wide - true).abs() / scale).nan_to_num(torch.inf).max())
