"""Fused nodes as functions of the emitted module, one for all that compute the same.

    def silu_mul(linear, linear_1):
        return F.silu(linear) * linear_1

With kernels the function is the body of an operator of torch, whose kernel is made of the text of the region:

    @kernel(\"\"\"
    graph silu_mul(%linear: f32[5,16], %linear_1: f32[5,16]) {
      %silu = silu(%linear): f32[5,16]
      ...
    \"\"\")
    def silu_mul(linear, linear_1):
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from regauge.backends.torch_module.code import Code
from regauge.backends.torch_module.naming import RESERVED, named_lines
from regauge.backends.torch_module.source import indented
from regauge.backends.torch_module.statements import Statements
from regauge.ir.errors import FusionError
from regauge.ir.fusion.fused import body_of, canonical, content
from regauge.ir.graph import Graph, Node, Value

if TYPE_CHECKING:
    from regauge.backends.torch_module.forward import Forward

_HEAD = """try:
    from regauge.backends.torch_module.kernels import kernel
except ModuleNotFoundError:  # without Regauge its kernels are what their bodies are in torch

    def kernel(region, rounding="fused", tuned=None):
        return lambda body: body"""


class Functions:
    """The functions of one emitted module; ``texts`` holds them by name."""

    def __init__(self, forward: Forward, *, kernels: bool, tuned: str | None = None) -> None:
        self.forward = forward
        self.kernels, self.tuned = kernels, tuned
        self.texts: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def sources(self) -> list[str]:
        """What stands in front of the classes."""
        decorated = any(text.startswith("@kernel") for text in self.texts.values())
        return [*([_HEAD] if decorated else []), *self.texts.values()]

    def name_of(self, node: Node) -> str:
        """The function that computes a fused node."""
        body = canonical(body_of(node))
        head = self._decorator(body, node.attributes["rounding"])
        code = self._code(body)
        key = "\n".join([code.key(), *([content(body), node.attributes["rounding"]] if head else [])])
        if key not in self._names:
            name = self._free(body.name)
            taken = {*self.forward.helpers.sources, *self.texts}
            given = {place: _plain(value.name, taken) for place, value in enumerate(body.inputs)}
            parameters, lines = named_lines(code, given, taken)
            signature = indented([f"def {name}({', '.join(parameters)}):"], 0)
            self._names[key] = name
            self.texts[name] = head + "\n".join([*signature, *indented(lines, 1)])
        return self._names[key]

    def _code(self, body: Graph) -> Code:
        outputs = [output for output in body.outputs if isinstance(output, Value)]
        self.forward.needed.update(outputs)
        code = Code("a function", "", list(body.nodes), list(body.inputs), outputs)
        Statements(self.forward, code, of_module=False).write(body.outputs)
        return code

    def _decorator(self, body: Graph, rounding: str) -> str:
        """What makes a function the body of an operator; nothing where there is no kernel of it."""
        if not self.kernels:
            return ""
        from regauge.backends.torch_module.kernels import kernel_of  # whose bodies are emitted modules

        try:
            kernel_of(body, "eager" if rounding == "eager" else "fused")
        except FusionError:
            return ""
        given = [] if rounding == "fused" else [f'rounding="{rounding}"']
        given += [] if self.tuned is None else [f"tuned={self.tuned!r}"]
        text = f'"""\n{body}\n"""'
        return f"@kernel({', '.join([text, *given])})\n"

    def _free(self, name: str) -> str:
        base = _plain(name, ())
        found, number = base, 1
        while found in self.texts or found in self.forward.helpers.sources:
            found, number = f"{base}_{number}", number + 1
        return found


def _plain(name: str, taken: Collection[str]) -> str:
    return f"{name}_" if name in RESERVED or name in taken else name
