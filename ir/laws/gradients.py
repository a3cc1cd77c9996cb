"""The law of gradients: of the expression for one index they are those that torch finds of the operator itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion.gradients import all_gradients
from regauge.ir.graph import Graph, Value
from regauge.ir.scalars import element_of

if TYPE_CHECKING:
    from regauge.ir.laws.cases import Case


def check_gradient(case: Case) -> None:
    """Check the law on one sample; raises LawError.

    Left are samples of which no derivative is stated, and operands of which torch has none.
    """
    if element_of(case.node) is None:
        return
    (result,) = case.results
    if not is_real(result.dtype) or any(isinstance(o, torch.Tensor) and o.is_complex() for o in case.operands):
        return
    tensors = [operand for operand in case.operands if isinstance(operand, torch.Tensor)]
    try:
        graph, of = all_gradients(_body(case))
    except FusionError:
        return
    seed = torch.linspace(0.5, 1.5, result.numel()).to(result.dtype).reshape(result.shape)
    for number, found in zip(of, graph.run([*tensors, seed]), strict=True):
        expected = _by_torch(case, number, seed)
        if expected is not None:
            case.expect_same([found], [expected], "gradient", "correct the element, or its derivatives")


def _body(case: Case) -> Graph:
    """The call as a graph of one node that reads inputs."""
    body = Graph(case.name)
    build = Builder(body)
    given = [
        build.input(f"x{slot}", tuple(operand.shape), operand.dtype) if isinstance(operand, torch.Tensor) else operand
        for slot, operand in enumerate(case.operands)
    ]
    results = [(value.shape, value.dtype) for value in case.node.outputs]
    found: Value = build(case.name, *given, results=results, **case.node.attributes)
    body.outputs = [found]
    return body


def _by_torch(case: Case, number: int, seed: torch.Tensor) -> torch.Tensor | None:
    """The gradient of one tensor among the operands; None where torch says that there is none."""
    slots = [slot for slot, operand in enumerate(case.operands) if isinstance(operand, torch.Tensor)]
    operands = list(case.operands)
    x = operands[slots[number]] = operands[slots[number]].detach().clone().requires_grad_()
    try:
        result = case.node.operator.evaluate(*operands, **case.node.attributes)
        (found,) = torch.autograd.grad(result, [x], seed, materialize_grads=True)
    except RuntimeError:
        return None
    return found
