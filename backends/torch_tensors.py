"""The lines of a constructor that make a module's own tensors; their data comes afterwards."""

from __future__ import annotations

import torch

from regauge.ir.errors import EmitError
from regauge.ir.graph import Parameter


def parameter_text(parameter: Parameter) -> str:
    options = "" if parameter.trainable else ", requires_grad=False"
    return f"nn.Parameter({_blank('torch.empty', parameter)}{options})"


def tensor_line(name: str, parameter: Parameter) -> str:
    if parameter.kind == "parameter":
        if name.isidentifier():
            return f"self.{name} = {parameter_text(parameter)}"
        return f'self.register_parameter("{name}", {parameter_text(parameter)})'
    persistent = parameter.persistent and parameter.kind == "buffer"
    options = "" if persistent else ", persistent=False"
    return f'self.register_buffer("{name}", {_blank("torch.zeros", parameter)}{options})'


def _blank(function: str, parameter: Parameter) -> str:
    if not isinstance(parameter.dtype, torch.dtype):
        raise EmitError(f"{parameter} holds {parameter.dtype} values, which torch tensors cannot: use to_onnx()")
    dtype = "" if parameter.dtype == torch.float32 else f", dtype={parameter.dtype}"
    sizes = ", ".join(str(size) for size in parameter.shape) or "()"
    return f"{function}({sizes}{dtype})"
