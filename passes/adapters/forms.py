"""Forms of adapters: which small parameters there are, how they start, and the change of the weight they stand for.

    D [outputs, columns] is what is added to a weight: up down, of rank r, or a whole matrix.

lora          up [o, r] and down [r, c] are parameters (Hu et al. 2021, LoRA)
dora          up down, and of the sum with the weight each output is brought to a length that trains (Liu et al. 2024,
              DoRA; gradients go through the length of the sum, which the paper takes for a constant)
svfit         up and down are frozen singular vectors, the singular values between them train (Sun et al. 2024, SVFit)
tensor-train  both are products of two cores, over two factors of o and two of c, a bond of rank r between all (Yang et
              al. 2024, LoRETTA)
lotr          left core right, of which a layer has only the core [r, r] to itself: a tensor train over layers, too
              (Bershatsky et al. 2024, LoTR; here left is common to all layers of as many outputs, right to all of as
              many columns, there both to layers of one kind)
tucker        up core down, in convolutions with a core over the places of the kernel (Si et al. 2024, FLoRA; its
              factors over the places, which are no smaller than these, are left out)
kronecker     a sum of r Kronecker products (Zhang et al. 2021, PHM)
compacter     the same of n matrices [n, n], which all layers have in common, with n of rank one, n being r or the next
              number below it that divides outputs and columns (Mahabadi et al. 2021, Compacter)
bone          one block [o, r] for every r columns (Kang 2024, Bone: its plain sum, not the product with the weight)

Each starts with one factor at zero and the others at random, or (``principal``) with the part of the weight that it
holds best, which is taken out of the frozen weight: of lora this is PiSSA (Meng et al. 2024), of kronecker SoKA (Chong
and Qu 2025; the rank is given, not found), of tensor-train DoTA (Hu et al. 2024, whose cores hold a factor of both
sides each). Layers of several blocks, as grouped convolutions are, take lora alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.passes.adapters.sites import Site, shaped

Tensors: TypeAlias = Mapping[str, torch.Tensor]
Values: TypeAlias = Mapping[str, Value]

LENGTH = "length"  # the parameter that outputs of the whole weight are brought to, where a form has one


class Factors(NamedTuple):
    """A change of rank r: ``down`` and ``up`` in the shapes of :class:`Site` where it has layers, else as matrices."""

    down: Value
    up: Value


@dataclass(frozen=True)
class Form:
    """``zero`` and ``principal`` give the first tensors of the parameters; ``change`` the factors or a whole matrix."""

    name: str
    zero: Callable[[Site, int, torch.Generator], Tensors] | None
    principal: Callable[[torch.Tensor, Site, int], Tensors] | None  # of [outputs, columns], lora of all blocks
    change: Callable[[Builder, Site, Values], Factors | Value]
    blocks: bool = False  # whether there may be several
    frozen: tuple[str, ...] = ()  # parameters that do not train
    directed: bool = False  # whether outputs are divided by their length
    shared: tuple[str, ...] = ()  # parameters that all layers have in common where they have one shape

    def misfit(self, site: Site) -> str | None:
        """Why this form does not suit a layer; None where it does."""
        if site.blocks > 1 and not self.blocks:
            return f"a layer of several blocks: {self.name} is for single matrices, lora is not"
        if self.directed and not bool(site.matrices()[0].any(1).all()):
            return "an output that is all zeros has no direction"
        return None


def _random(generator: torch.Generator, *shape: int, fan: int) -> torch.Tensor:
    """As the reference implementation of LoRA draws ``down``: uniform with variance 1 / (3 fan)."""
    bound = 1 / math.sqrt(fan)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound


def _halved(size: int) -> tuple[int, int]:
    """Two factors of a number, as near to one another as they come, the smaller first."""
    first = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return first, size // first


def _svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors [..., o, rank] and [..., rank, c], each with the roots of the singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root[..., None, :], right[..., :rank, :] * root[..., None]


def most_rank(site: Site) -> int:
    return min(site.outputs, site.columns)


# -- two factors -------------------------------------------------------------------------------------------------------


def down_as_stored(site: Site, down: torch.Tensor) -> torch.Tensor:
    """[blocks, rank, columns] as the parameter of ``down`` holds it."""
    if not site.has_layers:
        return down if site.blocks > 1 else down[0]
    flat = down[0].t() if site.layer is None else down
    return flat.reshape(site.down_shape(down.shape[1]))


def up_as_stored(site: Site, up: torch.Tensor) -> torch.Tensor:
    """[blocks, outputs, rank] as the parameter of ``up`` holds it."""
    if not site.has_layers:
        return up if site.blocks > 1 else up[0]
    return up.reshape(site.up_shape(up.shape[2]))


def _lora(site: Site, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    leaf = ".weight" if site.has_layers else ""
    return {f"down{leaf}": down_as_stored(site, down), f"up{leaf}": up_as_stored(site, up)}


def _lora_zero(site: Site, rank: int, generator: torch.Generator) -> Tensors:
    down = _random(generator, site.blocks, rank, site.columns, fan=site.columns)
    return _lora(site, down.new_zeros(site.blocks, site.outputs, rank), down)


def with_directions(site: Site, down: torch.Tensor) -> Tensors:
    """``lora`` that starts from given directions of the input, [rank, columns]."""
    return _lora(site, down.new_zeros(1, site.outputs, len(down)), down[None])


def _lora_change(build: Builder, site: Site, given: Values) -> Factors:
    leaf = ".weight" if site.has_layers else ""
    return Factors(given[f"down{leaf}"], given[f"up{leaf}"])


def _dora_zero(site: Site, rank: int, generator: torch.Generator) -> Tensors:
    lengths = site.matrices()[0].norm(dim=1)
    shape = [len(lengths) if axis == site.made else 1 for axis in range(site.weight.rank)]
    return {
        "down": _random(generator, rank, site.columns, fan=site.columns),
        "up": torch.zeros(site.outputs, rank, dtype=torch.float64),
        LENGTH: lengths.reshape(shape),
    }


def _dora_change(build: Builder, site: Site, given: Values) -> Value:
    product: Value = build.matmul(given["up"], given["down"])
    return product


def brought_to_length(build: Builder, site: Site, weight: Value, length: Value) -> Value:
    """A weight, as it is stored, with each output as long as ``length`` says."""
    others = tuple(axis for axis in range(weight.rank) if axis != site.made)
    squares = build.sum(build.mul(weight, weight), dims=others, keepdim=True)
    found: Value = build.mul(build.div(weight, build.sqrt(squares)), length)
    return found


def _as_layers(build: Builder, site: Site, down: Value, up: Value) -> Factors:
    """Factors that are computed, [rank, columns] and [outputs, rank], in the shapes of two layers."""
    if not site.has_layers:
        return Factors(down, up)
    rank = int(down.shape[0])
    down = build.permute(down, dims=(1, 0)) if site.layer is None else down
    return Factors(shaped(build, down, site.down_shape(rank)), shaped(build, up, site.up_shape(rank)))


def _svfit_principal(matrix: torch.Tensor, site: Site, rank: int) -> Tensors:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return {"left": left[:, :rank], "singular": values[:rank], "right": right[:rank]}


def _svfit_change(build: Builder, site: Site, given: Values) -> Factors:
    return _as_layers(build, site, given["right"], build.mul(given["left"], given["singular"]))


# -- tensor trains -----------------------------------------------------------------------------------------------------


def _train_zero(site: Site, rank: int, generator: torch.Generator) -> Tensors:
    (a, b), (c, d) = _halved(site.outputs), _halved(site.columns)
    first, last = min(rank, a), min(rank, d)
    return {
        "core_1": torch.zeros(a, first, dtype=torch.float64),
        "core_2": _random(generator, first, b, rank, fan=first),
        "core_3": _random(generator, rank, c, last, fan=last),
        "core_4": _random(generator, last, d, fan=site.columns),
    }


def _train_principal(matrix: torch.Tensor, site: Site, rank: int) -> Tensors:
    (a, b), (c, d) = _halved(site.outputs), _halved(site.columns)
    up, down = _svd(matrix, rank)
    first, second = _svd(up.reshape(a, b * rank), min(rank, a))
    third, fourth = _svd(down.reshape(rank * c, d), min(rank, d))
    return {
        "core_1": first,
        "core_2": second.reshape(-1, b, rank),
        "core_3": third.reshape(rank, c, -1),
        "core_4": fourth,
    }


def _train_change(build: Builder, site: Site, given: Values) -> Factors:
    second, third = given["core_2"], given["core_3"]
    (first, b, rank), (_, c, last) = second.shape, third.shape
    up = build.matmul(given["core_1"], build.reshape(second, shape=(first, b * rank)))
    down = build.matmul(build.reshape(third, shape=(rank * c, last)), given["core_4"])
    up = build.reshape(up, shape=(site.outputs, rank))
    return _as_layers(build, site, build.reshape(down, shape=(rank, site.columns)), up)


def _lotr_zero(site: Site, rank: int, generator: torch.Generator) -> Tensors:
    return {
        "left": _random(generator, site.outputs, rank, fan=rank),
        "core": torch.zeros(rank, rank, dtype=torch.float64),
        "right": _random(generator, rank, site.columns, fan=site.columns),
    }


def _lotr_change(build: Builder, site: Site, given: Values) -> Factors:
    return _as_layers(build, site, given["right"], build.matmul(given["left"], given["core"]))


# -- whole matrices ----------------------------------------------------------------------------------------------------


def _unfolded(matrix: torch.Tensor, site: Site) -> torch.Tensor:
    return matrix.reshape(site.outputs, site.columns // site.taps, site.taps)


def _tucker_zero(site: Site, rank: int, generator: torch.Generator) -> Tensors:
    channels = site.columns // site.taps
    out, into = min(rank, site.outputs), min(rank, channels)
    return {
        "down": _random(generator, into, channels, fan=site.columns),
        "core": torch.zeros(out, into, site.taps, dtype=torch.float64),
        "up": _random(generator, site.outputs, out, fan=out),
    }


def _tucker_principal(matrix: torch.Tensor, site: Site, rank: int) -> Tensors:
    unfolded = _unfolded(matrix, site)
    up = torch.linalg.svd(unfolded.flatten(1), full_matrices=False)[0][:, :rank]
    down = torch.linalg.svd(unfolded.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rank].t()
    return {"down": down, "core": torch.einsum("or,oit,si->rst", up, unfolded, down), "up": up}


def _tucker_change(build: Builder, site: Site, given: Values) -> Value:
    out, into, taps = given["core"].shape
    wide = build.matmul(given["up"], build.reshape(given["core"], shape=(out, into * taps)))
    split = build.permute(build.reshape(wide, shape=(site.outputs, into, taps)), dims=(0, 2, 1))
    whole = build.permute(build.matmul(split, given["down"]), dims=(0, 2, 1))
    result: Value = build.reshape(whole, shape=(site.outputs, site.columns))
    return result


def _kronecker_zero(site: Site, rank: int, generator: torch.Generator) -> Tensors:
    (a, b), (c, d) = _halved(site.outputs), _halved(site.columns)
    return {
        "first": _random(generator, a, c, rank, fan=site.columns),
        "second": torch.zeros(rank, b, d, dtype=torch.float64),
    }


def _kronecker_principal(matrix: torch.Tensor, site: Site, rank: int) -> Tensors:
    """Singular vectors of the weight, rearranged so that Kronecker products are products of vectors (Van Loan)."""
    (a, b), (c, d) = _halved(site.outputs), _halved(site.columns)
    arranged = matrix.reshape(a, b, c, d).transpose(1, 2).reshape(a * c, b * d)
    first, second = _svd(arranged, rank)
    return {"first": first.reshape(a, c, -1), "second": second.reshape(-1, b, d)}


def _kronecker_change(build: Builder, site: Site, given: Values) -> Value:
    (a, c, rank), (_, b, d) = given["first"].shape, given["second"].shape
    first = build.reshape(given["first"], shape=(a * c, rank))
    product = build.matmul(first, build.reshape(given["second"], shape=(rank, b * d)))
    arranged = build.permute(build.reshape(product, shape=(a, c, b, d)), dims=(0, 2, 1, 3))
    result: Value = build.reshape(arranged, shape=(site.outputs, site.columns))
    return result


def _compacter_zero(site: Site, rank: int, generator: torch.Generator) -> Tensors:
    both = math.gcd(site.outputs, site.columns)
    n = next(n for n in range(min(rank, both), 0, -1) if both % n == 0)
    return {
        "rule": _random(generator, n, n, n, fan=n),
        "up": torch.zeros(n, site.outputs // n, 1, dtype=torch.float64),
        "down": _random(generator, n, 1, site.columns // n, fan=site.columns),
    }


def _compacter_change(build: Builder, site: Site, given: Values) -> Value:
    n, b, d = int(given["rule"].shape[0]), given["up"].shape[1], given["down"].shape[2]
    second = build.reshape(build.matmul(given["up"], given["down"]), shape=(n, b * d))
    first = build.reshape(given["rule"], shape=(n * n, n))
    arranged = build.permute(build.reshape(build.matmul(first, second), shape=(n, n, b, d)), dims=(0, 2, 1, 3))
    result: Value = build.reshape(arranged, shape=(site.outputs, site.columns))
    return result


def _bone_zero(site: Site, rank: int, generator: torch.Generator) -> Tensors:
    return {"block": torch.zeros(site.outputs, min(rank, site.columns), dtype=torch.float64)}


def _bone_change(build: Builder, site: Site, given: Values) -> Value:
    outputs, width = given["block"].shape
    count = -(-site.columns // int(width))
    several = build.expand(build.unsqueeze(given["block"], dim=1), shape=(outputs, count, width))
    whole: Value = build.reshape(several, shape=(outputs, count * width))
    if count * width == site.columns:
        return whole
    cut: Value = build.slice(whole, dim=1, start=0, end=site.columns, step=1)
    return cut


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("lora", _lora_zero, lambda m, site, rank: _lora(site, *_svd(m, rank)), _lora_change, blocks=True),
        Form("dora", _dora_zero, None, _dora_change, directed=True),
        Form("svfit", None, _svfit_principal, _svfit_change, frozen=("left", "right")),
        Form("tensor-train", _train_zero, _train_principal, _train_change),
        Form("lotr", _lotr_zero, None, _lotr_change, shared=("left", "right")),
        Form("tucker", _tucker_zero, _tucker_principal, _tucker_change),
        Form("kronecker", _kronecker_zero, _kronecker_principal, _kronecker_change),
        Form("compacter", _compacter_zero, None, _compacter_change, shared=("rule",)),
        Form("bone", _bone_zero, None, _bone_change),
    )
}
