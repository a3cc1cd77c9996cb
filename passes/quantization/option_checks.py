"""Which options of ``quantize`` go together."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, get_args

from regauge.ir.errors import PassError
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.quantization.learned_codes import Learned
from regauge.passes.quantization.schemes import SCHEMES
from regauge.passes.quantization.targets import TARGETS

if TYPE_CHECKING:
    from regauge.passes.quantization.quantize import Quantize

_OF_ACTIVATIONS = ("calibration", "smoothing")
_OF_SCHEMES = (
    "per", "group", "symmetric", "statistic", "packed", "bits", "permute", "bytes", "accuracy", "latency",
    "sensitivity", "stack", "rank", "rule", "margin", "bias", "method", "correct", *_OF_ACTIVATIONS,
)  # fmt: skip


def check_options(options: Quantize) -> None:
    """Raise PassError for options that do nothing, or do not go together."""
    scheme, target = SCHEMES[options.scheme], TARGETS[options.target]
    taken = {*scheme.takes, *(_OF_ACTIVATIONS if scheme.activations else ())}
    taken -= {"smoothing"} if scheme.numbers is not None else set()
    taken |= {"method", "correct"} if scheme.make is not None else set()
    defaults = {entry.name: entry.default for entry in fields(options)}
    given = [name for name in _OF_SCHEMES if getattr(options, name) is not defaults[name]]
    idle = [name for name in given if name not in taken]
    if idle:
        raise PassError(f"quantize: {idle[0]} does nothing with scheme={options.scheme}: leave it out")
    _check_activations(options)
    if scheme.kind not in target.kinds:
        raise PassError(
            f"quantize: no kernel of {options.target} reads {scheme.kind}, which it would convert at every run: "
            f"target=reference stores scheme={options.scheme}"
        )
    if options.storage and not target.folds:
        raise PassError(f"quantize: {options.target} would convert weights at every run: leave storage=true out")
    if options.storage and scheme.mixed:
        raise PassError("quantize: with scheme=mixed what is in float was chosen so: leave storage=true out")
    if options.table_bits != 8 and not options.embeddings:
        raise PassError("quantize: table_bits does nothing with embeddings=false: leave it out")
    if options.calibration == "entropy" and scheme.numbers is not None:
        raise PassError("quantize: calibration=entropy counts steps of equal width, which floats have not")
    if options.margin is not None and options.rule == "cscale":
        raise PassError("quantize: margin does nothing with rule=cscale: leave it out")
    if options.bias is not None and options.rule != "cscale":
        raise PassError("quantize: bias does nothing without rule=cscale: leave it out")
    if options.calibration is not None and options.rule == "cscale":
        raise PassError("quantize: calibration does nothing with rule=cscale, which has one exponent: leave it out")
    _check_groups(options, blocks=target.blocks_alone and not scheme.activations)
    _check_bits(options)
    _check_target(options)
    if options.steps is not None and options.method not in get_args(Learned):
        raise PassError("quantize: steps are of method=adaround or flexround: leave them out")
    if options.correct is not None and options.method in get_args(Learned):
        raise PassError(f"quantize: biases are learned with method={options.method}: leave correct out")
    if options.correct and options.permute:
        raise PassError("quantize: correct=true knows the channels in their own order: leave permute=true out")
    if options.method in get_args(Learned) and scheme.kind != "integers":
        raise PassError(f"quantize: method={options.method} is for integers, not scheme={options.scheme}")


def _check_groups(options: Quantize, *, blocks: bool) -> None:
    """Raise PassError for groups that do not go together, or that a target which reads ``blocks`` does not."""
    tables = SCHEMES[options.scheme].kind == "codebooks"
    if tables and (options.permute or options.per == "group") and not options.group:
        raise PassError("quantize: codebooks of neighbouring outputs need their number: say group=N")
    if options.group and options.per not in (None, "group"):
        raise PassError(f"quantize: group={options.group} is not for per={options.per}: leave one out")
    group = options.group or TARGETS[options.target].block
    if blocks and (options.packed or options.per in ("tensor", "row") or group < 16 or group & (group - 1)):
        found = f"per={options.per}" if options.per in ("tensor", "row") else f"group={options.group}"
        found = "packed=true" if options.packed else found
        raise PassError(f"quantize: {options.target} reads blocks of 16, 32, 64, ... inputs, not {found}")


def _check_target(options: Quantize) -> None:
    scheme, target = SCHEMES[options.scheme], TARGETS[options.target]
    if not scheme.activations and scheme.bits > target.bits_alone:
        raise PassError(f"quantize: {options.target} has weights alone of {target.bits_alone} bits: scheme=w4")
    if target.centred and options.symmetric is False:
        raise PassError(f"quantize: weights have no zero points for {options.target}: leave symmetric=false out")
    if options.gate != "off" and not target.machines:
        raise PassError(f"quantize: {options.target} cannot be run here, so gate={options.gate} has nothing to measure")


def _check_activations(options: Quantize) -> None:
    if options.activations == "static":
        return
    if not SCHEMES[options.scheme].activations:
        raise PassError(f"quantize: activations does nothing with scheme={options.scheme}: leave it out")
    if SCHEMES[options.scheme].numbers is not None and (options.rule == "cscale" or options.margin is not None):
        given = "rule=cscale" if options.rule == "cscale" else f"margin={options.margin}"
        raise PassError(f"quantize: {given} is not for exponents of every run: leave activations=dynamic out")
    if options.calibration is not None:
        raise PassError("quantize: calibration does nothing with activations=dynamic: leave it out")
    if TARGETS[options.target].at_run is None:
        raise PassError(f"quantize: {options.target} has no ranges that are found at every run: activations=static")


def _check_bits(options: Quantize) -> None:
    bounds = [name for name in ("bytes", "accuracy", "latency") if getattr(options, name) is not None]
    if len(options.bits) > 1 and not SCHEMES[options.scheme].mixed:
        raise PassError(f"quantize: scheme={options.scheme} takes one number of bits, not {len(options.bits)}")
    if SCHEMES[options.scheme].mixed and len(bounds) != 1:
        raise PassError(
            "quantize: scheme=mixed takes one of bytes, latency and accuracy: write quantize{scheme=mixed,bytes=0.2}"
        )
    if options.bytes is not None:
        parse_amount(options.bytes, "bytes", "bytes")
    if options.latency is not None:
        parse_amount(options.latency, "latency", "time")
