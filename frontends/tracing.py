"""Torch's exporters tried in turn: non-strict, strict, and fx tracing; the first refusal is what is reported."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from regauge.frontends.from_fx import trace
from regauge.frontends.numeric_check import run_module
from regauge.frontends.outputs import plain_outputs
from regauge.frontends.provenance import source_of_error
from regauge.ir.errors import CaptureError
from regauge.ir.recurrent_shapes import stated_shapes

_ADVICE = (
    (("DynamicCache", "EncoderDecoderCache"),
     "return no cache object: pass use_cache=False or set config.use_cache=False"),
    (("not a known type", "Unsupported input type", "register_pytree", "unsupported output", "should be a pytree"),
     "take and return tensors in tuples, lists or dicts, or register the class with torch.utils._pytree"),
    (("data-dependent", "DataDependent", "data dependent", "bool(u", "Could not guard", "Eq(u"),
     "a Python branch or size depends on tensor values: use torch.cond for it, or state the fact by torch._check"),
    (("missing a required argument", "missing 1 required", "unexpected keyword", "positional argument"),
     "check the example inputs against forward's signature"),
)  # fmt: skip


# What torch says of results that are no pytree; older releases look a dataclass up in a set, where it has no hash.
_UNKNOWN_RESULT = ("not a known type", "unhashable type")


@contextlib.contextmanager
def in_mode(module: torch.nn.Module, training: bool) -> Iterator[None]:
    """The module in train or eval mode inside; every sub-module's own flag is restored after."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        if training:
            for member, flag in flags:
                member.training = flag  # the user's own mixture of frozen and training parts
        else:
            module.eval()
        yield
    finally:
        for member, flag in flags:
            member.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs, prints and warns about attempts of which only the last one counts."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _forward(module: torch.nn.Module, bound: Mapping[str, Any], change: Callable[[Any], Any] | None) -> Iterator[None]:
    """The module with a forward that torch.export can take, restored after.

    Names stand in place of ``**kwargs`` where axes inside them vary, which torch.export cannot be told otherwise;
    ``change`` is applied to the result.
    """
    original = module.forward
    parameters = inspect.signature(original).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    more = [name for name in bound if takes_more and name not in parameters]
    if not more and change is None:
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return result if change is None else change(result)

    named = [p for p in parameters.values() if not more or p.kind is not p.VAR_KEYWORD]
    named += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in more]
    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    had = "forward" in module.__dict__
    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = original
        else:
            del module.__dict__["forward"]


def bind_arguments(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The call's arguments by name as torch.export sees them, and how leaf names of each begin.

    Raises CaptureError where the call does not fit forward's signature.
    """
    signature = inspect.signature(module.forward)
    try:
        bound = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        name = type(module).__name__
        raise CaptureError(f"the example inputs do not fit {name}.forward{signature}: {error}") from None
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
    return bound, {name: name for name in bound}


def export_module(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: dict[str, Any] | None
) -> tuple[ExportedProgram, list[str]]:
    """The module as a program of ATen calls, and what of its results had to be changed to get it, in words.

    Raises CaptureError that names the source line and says what to do.
    """

    def attempt(target: torch.nn.Module, strict: bool, change: Callable[[Any], Any] | None = None) -> ExportedProgram:
        with _quiet(), torch.no_grad(), stated_shapes(), _forward(target, shapes or {}, change):
            return torch.export.export(target, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=strict)

    try:
        return attempt(module, False), []
    except Exception as error:  # every exporter fails in its own ways; the last word is CaptureError
        first = error
    with contextlib.suppress(Exception):
        if any(words in str(first) for words in _UNKNOWN_RESULT):
            changes: list[str] = []
            program = attempt(module, False, lambda result: plain_outputs(result, changes))
            if any(isinstance(n.meta.get("val"), torch.Tensor) for n in program.graph.output_node().all_input_nodes):
                return program, changes
    with contextlib.suppress(Exception):
        return attempt(module, True), []
    with contextlib.suppress(Exception):
        return attempt(trace(module), False), []
    own = _own_error(module, args, kwargs)
    if own is not None:
        raise CaptureError(explain_run(type(module).__name__, own)) from own
    raise CaptureError(explain(type(module).__name__, first)) from first


def _own_error(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception | None:
    """What the model itself raises on the inputs, if anything: then it is not the tracing that fails."""
    try:
        run_module(module, args, kwargs, protect=True)
    except Exception as error:
        return error
    return None


def explain_run(name: str, error: BaseException) -> str:
    """One line about a model that does not run."""
    reason, place = _reason_and_place(error)
    return f"{name} does not run on the example inputs: {reason}{place}; check their shapes and types"


def _reason_and_place(error: BaseException) -> tuple[str, str]:
    text = str(error).strip()
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    place = source_of_error(error)
    return reason[:300].rstrip("."), f", at {place}" if place else ""


def explain(name: str, error: BaseException) -> str:
    """One line: what could not be captured, where, why and what to do."""
    text = str(error).strip()
    reason, place = _reason_and_place(error)
    advice = "rewrite that line for tracing, or capture the parts of the model around it"
    for keys, remedy in _ADVICE:
        if any(key in text or key in type(error).__name__ for key in keys):
            advice = remedy
            break
    return f"{name} cannot be captured: {reason}{place}; {advice}"
