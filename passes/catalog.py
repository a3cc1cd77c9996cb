"""Which passes there are: the built-in ones, and those of installed packages (entry point group ``regauge.passes``).

A pass is imported when it is asked for, so that listing names costs nothing and a broken plug-in breaks only itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias

from regauge.ir.errors import PassError, RegaugeError
from regauge.passes.base import Pass
from regauge.passes.pipeline_text import parse_pipeline

GROUP = "regauge.passes"

BUILT_IN = {
    "adapt": "regauge.passes.adapters.adapt:Adapt",
    "arrange": "regauge.passes.quantization.arrange:Arrange",
    "canonicalize": "regauge.passes.factorization.canonicalize:Canonicalize",
    "coalesce": "regauge.passes.growing.coalesce:Coalesce",
    "convert-gqa": "regauge.passes.attention.convert_gqa:ConvertGqa",
    "deepen": "regauge.passes.growing.deepen:Deepen",
    "depth": "regauge.passes.depth.depth:Depth",
    "dequantize": "regauge.passes.quantization.dequantize:Dequantize",
    "derive": "regauge.passes.deriving.derive:Derive",
    "distil": "regauge.passes.fusing.distil:Distil",
    "equalize": "regauge.passes.quantization.equalize:Equalize",
    "factorize": "regauge.passes.factorization.factorize:Factorize",
    "flatten": "regauge.passes.quantization.flatten:Flatten",
    "fuse": "regauge.passes.kernels.fuse:Fuse",
    "fuse-blocks": "regauge.passes.fusing.fuse_blocks:FuseBlocks",
    "grow": "regauge.passes.growing.grow:Grow",
    "kv-cache": "regauge.passes.decoding.kv_cache:KvCache",
    "kv-latent": "regauge.passes.decoding.kv_latent:KvLatent",
    "kv-quantize": "regauge.passes.decoding.kv_quantize:KvQuantize",
    "merge-adapters": "regauge.passes.adapters.merge_adapters:MergeAdapters",
    "parallelize": "regauge.passes.fusing.parallelize:Parallelize",
    "prune": "regauge.passes.pruning.prune:Prune",
    "quantize": "regauge.passes.quantization.quantize:Quantize",
    "quotient-remainder": "regauge.passes.embedding.quotient_remainder:QuotientRemainder",
    "remat": "regauge.passes.memory.remat:Remat",
    "rotate": "regauge.passes.quantization.rotate:Rotate",
    "scalify": "regauge.passes.scaling.scalify:Scalify",
    "share": "regauge.passes.sharing.share:Share",
    "share-kv": "regauge.passes.attention.share_kv:ShareKv",
    "simplify": "regauge.passes.simplify.simplify:Simplify",
    "smooth": "regauge.passes.quantization.smooth:Smooth",
    "sort": "regauge.passes.elastic.sort:Sort",
    "sparsify": "regauge.passes.sparsity.sparsify:Sparsify",
    "split-experts": "regauge.passes.fusing.split_experts:SplitExperts",
    "split-projections": "regauge.passes.factorization.split_projections:SplitProjections",
    "stream": "regauge.passes.streaming.stream:Stream",
    "unfactorize": "regauge.passes.simplify.unfactorize:Unfactorize",
    "unfuse": "regauge.passes.kernels.fuse:Unfuse",
    "vocabulary": "regauge.passes.pruning.vocabulary:Vocabulary",
}

Passes: TypeAlias = str | Pass | Sequence["str | Pass"]


def pass_names() -> list[str]:
    """Names of all passes, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def find_pass(name: str) -> type[Pass]:
    """The class of a pass; raises PassError for an unknown name, with those that are like it."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found: type[Pass] = getattr(importlib.import_module(module), attribute)
        return found
    for point in entry_points(group=GROUP, name=name):
        return _load(point)
    close = get_close_matches(name, pass_names(), 1)
    hint = f": did you mean {close[0]!r}?" if close else f": there are {', '.join(pass_names())}"
    raise PassError(f"no pass is called {name!r}{hint}")


def pass_rows() -> list[list[str]]:
    """Of each pass its name, contract and summary; of one that cannot be used the reason, so that it hides no other."""
    rows = []
    for name in pass_names():
        try:
            one = find_pass(name)
            rows.append([name, one.contract, one.summary()])
        except RegaugeError as error:
            rows.append([name, "-", f"cannot be used: {error}"])
    return rows


def _load(point: EntryPoint) -> type[Pass]:
    try:
        found = point.load()
    except Exception as error:
        raise PassError(f"pass {point.name!r} of {point.value} cannot be imported: {error}") from error
    if isinstance(found, Pass) and not found.given_options():
        found = type(found)  # such as regauge.rewrite gives
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PassError(
            f"entry point {point.name!r} of {point.value} is neither a subclass of regauge.Pass nor a rewrite"
        )
    if found.name != point.name:
        raise PassError(
            f"entry point {point.name!r} of {point.value} calls itself {found.name!r}: let both names agree"
        )
    return found


def as_passes(passes: Passes) -> list[Pass]:
    """Passes from a pipeline text, a Pass, or a sequence of either; raises PassError for anything else."""
    if isinstance(passes, Pass):
        return [passes]
    if isinstance(passes, str):
        return [find_pass(stage.name).from_options(stage.options) for stage in parse_pipeline(passes)]
    if isinstance(passes, Sequence):
        return [one for entry in passes for one in as_passes(entry)]
    if isinstance(passes, type) and issubclass(passes, Pass):
        raise PassError(f"{passes.__name__} is the class of a pass: write {passes.__name__}()")
    raise PassError(f"passes are a text such as 'prune{{ratio=0.5}}', a Pass or a list of them, not {passes!r}")
