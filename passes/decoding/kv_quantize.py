"""The pass that keeps keys and values as integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from regauge.ir.edit import Builder, record
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.base import GIVE_DATA, Context, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.decoding.block_methods import kept_for, nodes_in_blocks, write_blocks
from regauge.passes.decoding.cache_bytes import in_words
from regauge.passes.decoding.coders import Coding, chosen_bits
from regauge.passes.decoding.kept import Kept, kept_by_cache, kept_values
from regauge.passes.decoding.kept_samples import Sample, sample_kept
from regauge.passes.decoding.positions import ATTENTIONS, find_positions
from regauge.passes.decoding.predicted import Predictions
from regauge.passes.decoding.quantized_cache import Coder, write_coded
from regauge.passes.decoding.recent import BlockMethod
from regauge.passes.decoding.recognised import refuse_caches
from regauge.passes.decoding.shrunk import FLOAT_BITS, Shrinking, chosen_ranks, shrinking
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class KvQuantize(Pass):
    """Round what a cache keeps of keys and values to integers of few bits, which share bytes.

    before   attention(q, k, v)
    after    attention(q, back(codes of k, ranges of k), back(codes of v, ranges of v))

    Rounded is whatever ``kv-cache`` would keep: keys and values as attention reads them, or latents; run it in front
    of ``kv-cache``, which keeps codes and ranges then. Methods:

    ``ranges``   each position has a range (lowest number and step, in half precision) for each ``group`` of
                 neighbouring channels, as values have in KIVI (Liu et al. 2024); with data channels are centred and
                 balanced: ranges against what an error in them changes
    ``rotated``  the same, of channels turned by a Hadamard matrix in the order of their means (Su et al. 2025,
                 RotateKV; nothing is kept apart for the first positions)
    ``coupled``  8 / ``bits`` neighbouring channels share a byte, the number of a vector in a table made from data
                 (Zhang et al. 2024, coupled quantization); there are no ranges
    ``kivi``     ranges of keys are those of a channel over a ``block`` of positions, which stay as they are until it is
                 full (Liu et al. 2024, KIVI; values wait as long as keys, there for the last ``block`` positions each)
    ``gear``     the same, with what codes miss as a map of rank 2 and 2 % of entries apart (Kang et al. 2024, GEAR);
                 for the sizes of both torch's exporter to ONNX needs some ten seconds an attention
    ``cskv``     positions of full blocks as latents of all heads of few channels, made from data (Wang et al. 2024,
                 CSKV, here in closed form), of ``bits`` bits with ranges over a block, or 16: half precision. ``bytes``
                 chooses ranks (those of full blocks); without it the rank is half of the channels

    ``before_rotation`` rounds keys as their layer gives them, and rotates what is given back at every step (as
    RotateKV, coupled quantization and AQUA-KV do). ``predict`` keeps what is off from a linear prediction by the layer
    before (Shutova et al. 2025, AQUA-KV), with data; at every step it multiplies all past positions by a matrix for
    each. ``bytes`` chooses the bits of each of keys and values, with data, so that least is lost within the budget.
    """

    name = "kv-quantize"

    bits: Literal[16, 8, 4, 2, 1] = option(4, "bits of a number; 1 with method=coupled, 16 with method=cskv")
    bytes: float | int | str | None = option(
        None,
        "in place of bits, or of the rank of cskv: bytes per position, as share of those of the cache as it is, or "
        "512, 2kB",
    )
    method: Literal["ranges", "rotated", "coupled", "kivi", "gear", "cskv"] = option("ranges", "how numbers are kept")
    block: int = option(32, "positions that are rounded together, by kivi, gear and cskv", at_least=2)
    group: int | None = option(
        None, "channels that share a range; all of a head, or of a latent, as a rule", at_least=2
    )
    before_rotation: bool | None = option(None, "round keys before they are rotated; as the method does it as a rule")
    predict: bool = option(False, "keep what is off from a prediction by the layer before")
    axis: str | None = option(None, "name of the dynamic size that counts positions, where attention does not tell")
    seed: int = option(0, "seed of the directions of gradients", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bytes is not None:
            parse_amount(self.bytes, "bytes", "bytes")
        if self._blocks is not None and (self.predict or self.before_rotation):
            raise PassError(f"kv-quantize: method={self.method} goes without predict and before_rotation")
        if self.method in ("kivi", "gear") and self.bytes is not None:
            raise PassError(f"kv-quantize: method={self.method} goes without bytes")
        if self.method == "cskv" and self.group is not None:
            raise PassError("kv-quantize: method=cskv goes without group: a latent has a range of its own")
        widths = (*self._coding.widths(), FLOAT_BITS) if self.method == "cskv" else self._coding.widths()
        if (self.bytes is None or self.method == "cskv") and self.bits not in widths:
            known = {1: "coupled", FLOAT_BITS: "cskv"}[self.bits]
            raise PassError(f"kv-quantize: bits={self.bits} is for method={known}: give bits={min(widths)} or more")

    @property
    def _coding(self) -> Coding:
        method = self.method
        return Coding(method if method == "rotated" or method == "coupled" else "ranges", self.group)

    @property
    def _blocks(self) -> BlockMethod | None:
        """The method, where it rounds blocks of positions."""
        method = self.method
        return method if method == "kivi" or method == "gear" or method == "cskv" else None

    def call(self, graph: Graph, context: Context) -> Graph:
        refuse_caches(graph, self.name)
        names, before = kept_by_cache(graph, self.axis, by=self.name)
        if self._blocks is not None:
            return self._in_blocks(graph, self._blocks, names, before, context)
        early = self.before_rotation
        early = (self.method != "ranges" or self.predict) if early is None else early
        kinds = [kind for kind, asked in (("keys", early), ("values", self.predict)) if asked]
        found = kept_values(graph, names, self.axis, early=kinds)
        kept = [own for own, value in zip(found, _values(graph, found), strict=True) if self._fits(value, context)]
        if not kept:
            _tell_nothing(graph, names, context)
            return graph
        samples = self._samples(graph, kept, context)
        result = graph.copy()
        chosen = self._chosen(result, kept, samples, before)
        build = Builder(result, by=self.name)
        predictions = Predictions(build)
        for own, value, (bits, coder) in zip(kept, _values(result, kept), chosen, strict=True):
            sample = samples.get(own.name)
            if self.predict and sample is not None:
                left = predictions.residual(own, sample)
                predictions.write(value, own, sample, left, self._coding.coder(value, bits, own.size, left))
            else:
                coder = coder or self._coding.coder(value, bits, own.size, sample)
                write_coded(build, value, coder)
        record(result, self.name, f"{len(kept)} values of {_in_words([bits for bits, _ in chosen])} bits")
        after = kept_by_cache(result, self.axis, by=self.name)[1]
        context.note(f"{in_words(before)} -> {in_words(after)} of caches for each position of a sequence")
        if self.bytes is not None:
            context.note(", ".join(f"{own.name}: {bits} bits" for own, (bits, _) in zip(kept, chosen, strict=True)))
        return result

    def _in_blocks(
        self, graph: Graph, method: BlockMethod, names: Sequence[str], before: float, context: Context
    ) -> Graph:
        """The methods that round blocks of positions."""
        nodes = nodes_in_blocks(graph, self.group, self.axis, context.left)
        shrunk = self._shrunk(graph, nodes, before, context) if method == "cskv" and nodes else {}
        if method == "cskv":
            positions = find_positions(graph, self.axis)
            reached = [node for node in nodes if all(own.name in shrunk for own in kept_for(node, positions))]
            context.left["keys or values that no output depends on"] += len(nodes) - len(reached)
            nodes = reached
        if not nodes:
            _tell_nothing(graph, names, context)
            return graph
        result = graph.copy()
        copies = [own for own, node in zip(result.nodes, graph.nodes, strict=True) if node in set(nodes)]
        waiting = write_blocks(
            result, copies, method, self.bits, self.block, self.group, self.axis, shrunk=shrunk, by=self.name
        )
        record(result, self.name, f"keys and values of {len(nodes)} attentions in blocks of {self.block} positions")
        after = kept_by_cache(result, self.axis, by=self.name)[1]
        context.note(f"{in_words(before)} -> {in_words(after)} of caches for each position of a sequence")
        context.note(f"and up to {in_words(waiting)} of positions whose block is not full")
        return result

    def _shrunk(
        self, graph: Graph, nodes: Sequence[Node], before: float, context: Context
    ) -> dict[str, tuple[Shrinking, int]]:
        """Of keys and values of these attentions how to shrink them, and their ranks."""
        positions = find_positions(graph, self.axis)
        values = {value.name: value for node in nodes for value in kept_for(node, positions)}
        if context.data is None:
            raise PassError(f"kv-quantize: method=cskv shrinks channels as data shows them: {GIVE_DATA}")
        batches = calibration_batches(graph, context)
        context.note(f"statistics of {sum(map(examples_in, batches))} examples")
        samples = sample_kept(graph, list(values.values()), batches, self.seed)
        found = {name: shrinking(values[name], sample) for name, sample in samples.items()}
        budget = None if self.bytes is None else parse_amount(self.bytes, "bytes", "bytes").of(before)
        ranks = chosen_ranks(found, self.bits, self.block, budget)
        context.cuts += [
            Cut(f"{name}, rank", found[name].channels, rank)
            for name, rank in ranks.items()
            if rank < found[name].channels
        ]
        return {name: (found[name], rank) for name, rank in ranks.items()}

    def _samples(self, graph: Graph, kept: Sequence[Kept], context: Context) -> dict[str, Sample]:
        if context.data is None:
            if self.predict or self.bytes is not None:
                raise PassError(f"kv-quantize: {'predict' if self.predict else 'bytes'} needs data: {GIVE_DATA}")
            return {}
        batches = calibration_batches(graph, context)
        context.note(f"statistics of {sum(map(examples_in, batches))} examples")
        return sample_kept(graph, _values(graph, kept), batches, self.seed)

    def _chosen(
        self, graph: Graph, kept: Sequence[Kept], samples: Mapping[str, Sample], before: float
    ) -> list[tuple[int, Coder | None]]:
        """The bits of each, and its coder where that was made to choose them."""
        if self.bytes is None:
            return [(self.bits, None) for _ in kept]
        known = [own for own in kept if own.name in samples]
        allowed = parse_amount(self.bytes, "bytes", "bytes").of(before)
        found = chosen_bits(
            self._coding,
            [(value, own.size, samples[own.name]) for own, value in zip(known, _values(graph, known), strict=True)],
            allowed,
        )
        by_name = dict(zip([own.name for own in known], found, strict=True))
        return [by_name.get(own.name, (self._coding.widths()[0], None)) for own in kept]

    def _fits(self, value: Value, context: Context) -> bool:
        if not (isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point):
            context.left["a cache that holds no floating point numbers"] += 1
        elif value.producer is None or not isinstance(value.shape[-1], int):
            context.left["a cache whose last axis holds no channels"] += 1
        elif reason := self._coding.misfit(value.shape[-1], self.bits):
            context.left[reason] += 1
        else:
            return True
        return False


def _values(graph: Graph, kept: Sequence[Kept]) -> list[Value]:
    by_name = {value.name: value for value in graph.values()}
    return [by_name[own.name] for own in kept]


def _tell_nothing(graph: Graph, names: Sequence[str], context: Context) -> None:
    """Say why nothing is kept in codes, where no attention has a reason of its own."""
    if not names:
        context.left["nothing mixes positions: there is nothing to keep"] += 1
    elif not any(node.op in ATTENTIONS for node in graph.nodes):
        context.left["attention that is several nodes: simplify{assemble=always} before makes one of them"] += 1


def _in_words(bits: Sequence[int]) -> str:
    return str(bits[0]) if len(set(bits)) == 1 else f"{min(bits)} to {max(bits)}"
