"""Shapes of recurrent layers while torch traces: stated, so that a dynamic sequence length stays dynamic.

Torch finds the shape of an LSTM by unrolling it over the sequence, which fixes its length to the example's. The shapes
are plain: (length, batch, features), and one final state per layer and direction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _stated(target: Any) -> Callable[..., Any]:
    names = [argument.name for argument in target._schema.arguments]

    def shapes(*args: Any, **kwargs: Any) -> Any:
        """Empty results of ``aten.lstm.input(x, hx, params, ..., bidirectional, batch_first)``."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, states = given["input"], given["hx"]
        finals = list(states) if isinstance(states, list | tuple) else [states]
        features = finals[0].shape[-1] * (2 if given["bidirectional"] else 1)  # the state, projected where there is one
        return (x.new_empty([*x.shape[:-1], features]), *[torch.empty_like(state) for state in finals])

    return shapes


@contextlib.contextmanager
def stated_shapes() -> Iterator[None]:
    """Inside, tracing takes the shapes of recurrent layers from here; nothing happens where torch's internals moved."""
    keys = [torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd]
    targets = [getattr(torch.ops.aten, name).input for name in _LAYERS]
    if not all(hasattr(target, "py_kernels") and hasattr(target, "_dispatch_cache") for target in targets):
        yield
        return
    saved = [dict(target.py_kernels) for target in targets]
    try:
        for target in targets:
            target.py_kernels.update(dict.fromkeys(keys, _stated(target)))
            target._dispatch_cache.clear()
        yield
    finally:
        for target, kernels in zip(targets, saved, strict=True):
            target.py_kernels.clear()
            target.py_kernels.update(kernels)
            target._dispatch_cache.clear()
