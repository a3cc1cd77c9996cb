"""The lines of a constructor that make a module's own tensors; their data comes afterwards."""

from __future__ import annotations

import torch

from regauge.backends.torch_module.source import is_plain_name, quoted
from regauge.ir.errors import EmitError
from regauge.ir.graph import Parameter


def needs_gradient(parameter: Parameter) -> bool:
    dtype = parameter.dtype
    return parameter.trainable and isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)


def parameter_text(parameter: Parameter) -> str:
    options = "" if needs_gradient(parameter) else ", requires_grad=False"
    return f"nn.Parameter({_blank('torch.empty', parameter)}{options})"


def tensor_line(name: str, parameter: Parameter, trained: bool) -> str:
    if trained:
        if is_plain_name(name):
            return f"self.{name} = {parameter_text(parameter)}"
        return f"self.register_parameter({quoted(name)}, {parameter_text(parameter)})"
    persistent = parameter.persistent and parameter.kind != "constant"
    options = "" if persistent else ", persistent=False"
    return f"self.register_buffer({quoted(name)}, {_blank('torch.zeros', parameter)}{options})"


def _blank(function: str, parameter: Parameter) -> str:
    if not isinstance(parameter.dtype, torch.dtype):
        raise EmitError(f"{parameter} holds {parameter.dtype} values, which torch tensors cannot: use to_onnx()")
    dtype = "" if parameter.dtype == torch.float32 else f", dtype={parameter.dtype}"
    sizes = ", ".join(str(size) for size in parameter.shape) or "()"
    return f"{function}({sizes}{dtype})"
