"""Tells operators whose Python function gives a sequence of tensors from those that give one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

from regauge.backends.torch_module.sizes import symbols_in
from regauge.ir.errors import EmitError, RegaugeError, first_line
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Sample
from regauge.ir.sizes.expressions import evaluate as evaluate_sizes
from regauge.ir.sizes.expressions import prime_hints


def gives_sequence(node: Node) -> bool:
    """True where the node's function returns a tuple or list, even of one tensor (a split into one piece)."""
    if node.regions:
        return True
    known = _always(node.operator.evaluate, node.operator.samples)
    return _here(node) if known is None else known


@cache
def _always(evaluate: Callable[..., Any], samples: Callable[[], Iterable[Sample]] | None) -> bool | None:
    """The answer where all samples of an operator agree, else None."""
    answers = set()
    for case in samples() if samples is not None else ():
        with torch.no_grad():
            answers.add(isinstance(evaluate(*case.operands, **case.attributes), tuple | list))
    return answers.pop() if len(answers) == 1 else None


def _here(node: Node) -> bool:
    """The answer for this call, found by running it on tensors without data.

    Raises EmitError where torch refuses these sizes: a cut may leave a batch norm one value per channel.
    """
    shapes = [operand.shape if isinstance(operand, Value) else operand for operand in node.inputs]
    hints = prime_hints(symbols_in((*shapes, *node.attributes.values())))

    def stand_in(operand: Any) -> Any:
        if not isinstance(operand, Value):
            return evaluate_sizes(operand, hints)
        dtype = operand.dtype if isinstance(operand.dtype, torch.dtype) else torch.float32
        return torch.empty(evaluate_sizes(operand.shape, hints), dtype=dtype, device="meta")

    attributes = {key: evaluate_sizes(value, hints) for key, value in node.attributes.items()}
    try:
        with torch.no_grad():
            return isinstance(node.operator.evaluate(*map(stand_in, node.inputs), **attributes), tuple | list)
    except RegaugeError:
        raise
    except Exception as error:
        line = first_line(error)
        raise EmitError(
            f"{node.label} cannot run on the sizes it has: {line}: "
            "if they were cut, keep more (prune takes minimum= and exclude=)"
        ) from error
