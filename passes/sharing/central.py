"""Layers that are matrix product operators with one central tensor: W_l = A_l C B_l (MPOBERT, MPOE).

    two sites      W_l[x y, a b] = sum over r      A_l[r x a] C[r y b]
    three sites    W_l[x y z, a b c] = sum over r, s    A_l[r x a] C[r s y b] B_l[s z c]

Liu et al. 2023, Enhancing Scalability of Pre-trained Language Models via Efficient Parameter Sharing, section 3.2, and
Gao et al. 2022, Parameter-Efficient Mixture-of-Experts Architecture (MPOE): a layer as a matrix product operator, whose
central tensor, with most of the parameters, all layers share, and whose auxiliary tensors at the ends are its own. They
train from tensors that were shared all along; here these are fitted to the layers that are there: at first the
directions that all layers have in common, then all tensors in turns. The sizes of sites and bonds, theirs by hand, are
chosen by what is lost. With x all outputs and a = 1 the layers share a basis of their inputs, each with a small layer
of its own behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product as combinations

import torch

from regauge.ir.edit import record, tie
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.chains import write_chain
from regauge.passes.factorization.curvature import inverse_curvature
from regauge.passes.factorization.least_squares import bettered
from regauge.passes.factorization.networks import Network, Sizes, count
from regauge.passes.factorization.problems import Problem
from regauge.passes.sharing.fitting import solved
from regauge.passes.sharing.grouping import least_loss
from regauge.passes.sharing.sites import Problems, Site, problems_at

Factors = list[torch.Tensor]

NETWORKS = (Network("ab", "xy", ("rxa", "ryb")), Network("abc", "xyz", ("rxa", "rsyb", "szc")))
_CENTRAL = 1  # the place of the factor that is shared
_TURNS, _FIRST_TURNS = 16, 1  # of all tensors; and when choices are weighed
_STEPS = 3  # of conjugate gradients on an auxiliary tensor, in a turn
_GAIN = 1e-3  # of the error in a turn, below which there is no other
_SHARES = (0.13, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the layers' parameters for which a choice is looked for
_BEST = 2  # for each of these
_LONGEST = 1024  # the shorter side of an unfolding whose directions are looked for
_SPLITS = 48  # that are looked at, and as many fewer as layers are larger than
_ENTRIES = 1 << 21


@dataclass(frozen=True)
class Choice:
    """A network with the sizes of its axes and bonds, and what layers lose with the directions that they share."""

    network: Network
    sizes: tuple[tuple[str, int], ...]
    parameters: int
    loss: float


@dataclass
class Central:
    """Layers that share the central tensor of a network."""

    names: tuple[str, ...]
    network: Network
    sizes: Sizes
    factors: dict[str, Factors]  # of each layer, the central one the same tensor

    _own: dict[str, Factors] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return _parameters(self.network, self.sizes, len(self.names))

    def matrix(self, problem: Problem) -> torch.Tensor:
        name = problem.layer.weight.name
        found = self._own[name] = _own_bettered(self.network, problem, self.sizes, self.factors[name])
        return self.network.image(found, self.sizes)

    def write(self, graph: Graph, layers: Sequence[Layer], *, by: str) -> None:
        shared = None
        for layer in layers:
            links = self.network.links(self._own[layer.weight.name], self.sizes)
            place = [step.place for step in self.network.steps(self.sizes)].index(_CENTRAL)
            weight = write_chain(graph, layer, links, by=by)[place]
            if shared is None:
                shared = weight
            else:
                tie(graph, shared, weight)
        assert shared is not None
        record(graph, by, f"{shared.name}: the central tensor of {len(layers)} layers")


def centrals(sites: Sequence[Site], problems: Problems, allowed: float) -> list[Central]:
    """A central tensor for each site of linear layers, all so large that least is lost within ``allowed`` parameters.

    Raises PassError where no choice is small enough.
    """
    options, found = dict[Site, list[tuple[int, float]]](), dict[Site, list[Central]]()
    for site in sites:
        own = problems_at(site, problems)
        weighed = [fitted(site, own, choice, _FIRST_TURNS) for choice in (choices(own) if _fits(own[0]) else ())]
        whole = (len(own) * site.size, 0.0)
        found[site] = weighed
        options[site] = [whole, *((one.parameters, _error(own, one)) for one in weighed)]
    picks, _ = least_loss(options, allowed)
    chosen = [(site, found[site][pick - 1]) for site, pick in picks.items() if pick]
    return [_turned(one, problems_at(site, problems), _TURNS) for site, one in chosen]


def _fits(problem: Problem) -> bool:
    """Whether a layer can be such a network."""
    return problem.layer.node.op in ("linear", "matmul") and problem.layer.blocks == 1


def _parameters(network: Network, sizes: Sizes, layers: int) -> int:
    own = [count(factor, sizes) for factor in network.factors]
    return own[_CENTRAL] + layers * (sum(own) - own[_CENTRAL])


# -- choices -----------------------------------------------------------------------------------------------------------


def choices(problems: Sequence[Problem]) -> list[Choice]:
    """For each of some sizes those that lose least, of all that take no more multiplications than layers do."""
    weights = torch.stack([problem.weight for problem in problems])
    every = [choice for network in NETWORKS for choice in _every(network, weights)]
    kept: dict[Choice, None] = {}
    for share in _SHARES:
        small = [choice for choice in every if choice.parameters <= share * weights.numel()]
        kept.update(dict.fromkeys(sorted(small, key=lambda choice: choice.loss)[:_BEST]))
    return list(kept)


def _every(network: Network, weights: torch.Tensor) -> Iterator[Choice]:
    layers, outputs, columns = weights.shape
    for axes in _splits(network, layers, outputs, columns):
        left = _unfolded(network, axes, weights)
        tail = _tail(left)
        for share in _SHARES:
            sizes = _bonds(network, axes, layers, share * weights.numel())
            if sizes is not None and network.products(sizes) <= outputs * columns:
                rank = sizes[network.bonds[0]]
                loss = float(tail[rank])
                if len(network.bonds) > 1:
                    loss += _second_loss(network, left, sizes)
                yield Choice(network, tuple(sizes.items()), _parameters(network, sizes, layers), loss)


def _splits(network: Network, layers: int, outputs: int, columns: int) -> list[dict[str, int]]:
    """Ways to split both sides into axes; of many evenly some, by the size of the first site."""
    found = []
    for made, given in combinations(_factorings(outputs, network.outputs), _factorings(columns, network.inputs)):
        sizes = {**made, **given}
        sites = [sizes[x] * sizes[a] for x, a in zip(network.outputs, network.inputs, strict=True)]
        ends = [site for place, site in enumerate(sites) if place != _CENTRAL]
        if min(sites) == 1 or (len(ends) > 1 and max(ends) > sites[_CENTRAL]):
            continue
        if min(layers * sites[0], outputs * columns // sites[0]) <= _LONGEST:
            found.append(sizes)
    found.sort(key=lambda sizes: (sizes["x"] * sizes["a"], sizes["x"]))
    most = max(8, _SPLITS * _ENTRIES // max(_ENTRIES, layers * outputs * columns))
    if len(found) > most:
        found = [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]
    return found


def _factorings(size: int, letters: str) -> Iterator[dict[str, int]]:
    """The ways to write a number as a product of axes."""
    first, rest = letters[0], letters[1:]
    if not rest:
        yield {first: size}
        return
    for own in range(1, size + 1):
        if size % own == 0:
            yield from ({first: own, **others} for others in _factorings(size // own, rest))


def _bonds(network: Network, axes: Sizes, layers: int, allowed: float) -> dict[str, int] | None:
    """The axes, and bonds with equal shares of the most that they can be, within a number of parameters."""
    first = layers * axes["x"] * axes["a"]
    others = count(network.axes, axes) // (axes["x"] * axes["a"])
    most = {"r": min(first, others)}
    if "s" in network.bonds:
        most["s"] = axes["z"] * axes["c"]
    low, high = 0, most["r"]
    while low < high:  # the greatest first bond
        rank = (low + high + 1) // 2
        if _parameters(network, _sizes(axes, most, rank), layers) <= allowed:
            low = rank
        else:
            high = rank - 1
    return _sizes(axes, most, low) if low else None


def _sizes(axes: Sizes, most: Sizes, rank: int) -> dict[str, int]:
    return {**axes, **{bond: max(1, round(size * rank / most["r"])) for bond, size in most.items()}}


def _unfolded(network: Network, axes: Sizes, weights: torch.Tensor) -> torch.Tensor:
    """[layers, first site, all others] of matrices [layers, outputs, columns]."""
    given = network.outputs + network.inputs
    order = "".join(x + a for x, a in zip(network.outputs, network.inputs, strict=True))
    grid = weights.reshape(len(weights), *(axes[axis] for axis in given))
    return torch.einsum(f"l{given}->l{order}", grid).reshape(len(weights), axes["x"] * axes["a"], -1)


def _gram(left: torch.Tensor) -> torch.Tensor:
    rows = left.flatten(0, 1)
    return rows @ rows.t() if rows.shape[0] <= rows.shape[1] else rows.t() @ rows


def _tail(left: torch.Tensor) -> torch.Tensor:
    """What is lost with each number of common directions, from none."""
    values = torch.linalg.eigvalsh(_gram(left)).clamp(min=0)
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)


def _second_loss(network: Network, left: torch.Tensor, sizes: Sizes) -> float:
    """About what a second bond loses: the directions that the last site has in common in all layers."""
    last = sizes["z"] * sizes["c"]
    columns = left.reshape(-1, last)
    values = torch.linalg.eigvalsh(columns.t() @ columns).clamp(min=0)
    return float(values[: last - sizes["s"]].sum())


# -- fitting -----------------------------------------------------------------------------------------------------------


def fitted(site: Site, problems: Sequence[Problem], choice: Choice, turns: int) -> Central:
    """The tensors of a choice for the layers of a site, after turns."""
    sizes = dict(choice.sizes)
    weights = torch.stack([problem.weight for problem in problems])
    starts = _common(choice.network, sizes, weights)
    return _turned(
        Central(site.names, choice.network, sizes, dict(zip(site.names, starts, strict=True))), problems, turns
    )


def _common(network: Network, sizes: Sizes, weights: torch.Tensor) -> list[Factors]:
    """The tensors of each layer by the first directions that the first sites of all of them have in common."""
    left, rank = _unfolded(network, sizes, weights), sizes["r"]
    rows = left.flatten(0, 1)
    _, vectors = torch.linalg.eigh(_gram(left))
    vectors = vectors[:, -rank:]
    if rows.shape[0] <= rows.shape[1]:
        first, rest = vectors, vectors.t() @ rows
    else:
        first, rest = rows @ vectors, vectors.t()
        lengths = first.norm(dim=0).clamp(min=1e-150)
        first, rest = first / lengths, lengths[:, None] * rest
    own = first.reshape(len(weights), sizes["x"], sizes["a"], rank).movedim(3, 1)
    if len(network.bonds) == 1:
        core = rest.reshape(rank, sizes["y"], sizes["b"])
        return [[each.contiguous(), core] for each in own]
    u, s, v = torch.linalg.svd(rest.reshape(-1, sizes["z"] * sizes["c"]), full_matrices=False)
    bond = sizes["s"]
    core = (u * s)[:, :bond].reshape(rank, sizes["y"], sizes["b"], bond).movedim(3, 1).contiguous()
    last = v[:bond].reshape(bond, sizes["z"], sizes["c"])
    return [[each.contiguous(), core, last] for each in own]


def _turned(found: Central, problems: Sequence[Problem], turns: int) -> Central:
    """The auxiliary tensors beside the central one and it beside them, until a turn gains little."""
    error = _error(problems, found)
    for _ in range(turns):
        pairs = zip(problems, found.factors.values(), strict=True)
        own = [_own_bettered(found.network, problem, found.sizes, factors) for problem, factors in pairs]
        core = _core(found.network, found.sizes, problems, own)
        own = [[*each[:_CENTRAL], core, *each[_CENTRAL + 1 :]] for each in own]
        found = Central(found.names, found.network, found.sizes, dict(zip(found.names, own, strict=True)))
        before, error = error, _error(problems, found)
        if before - error <= _GAIN * before:
            break
    return found


def _error(problems: Sequence[Problem], found: Central) -> float:
    pairs = zip(problems, found.factors.values(), strict=True)
    return sum(problem.error(found.network.image(factors, found.sizes)) for problem, factors in pairs)


def _own_bettered(network: Network, problem: Problem, sizes: Sizes, factors: Sequence[torch.Tensor]) -> Factors:
    found = list(factors)
    for place in range(len(found)):
        if place != _CENTRAL:
            divided = inverse_curvature(network, problem, sizes, found, place)
            found[place] = bettered(
                problem, partial(_image, network, sizes, found, place), found[place], divided, _STEPS
            )
    return found


def _image(
    network: Network, sizes: Sizes, factors: Sequence[torch.Tensor], place: int, own: torch.Tensor
) -> torch.Tensor:
    return network.image([*factors[:place], own, *factors[place + 1 :]], sizes)


def _core(network: Network, sizes: Sizes, problems: Sequence[Problem], factors: Sequence[Factors]) -> torch.Tensor:
    """The central tensor that loses least in all layers beside their auxiliary ones."""
    letters = [factor for place, factor in enumerate(network.factors) if place != _CENTRAL]
    sides = network.outputs + network.inputs
    back = f"{','.join(letters)},{sides}->{network.factors[_CENTRAL]}"

    def gathered(matrices: Iterator[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(factors[0][_CENTRAL])
        for problem, own, matrix in zip(problems, factors, matrices, strict=True):
            others = [factor for place, factor in enumerate(own) if place != _CENTRAL]
            weighed = (problem.weighed(matrix) / problem.scale).reshape([sizes[axis] for axis in sides])
            total += torch.einsum(back, *others, weighed)
        return total

    def image(core: torch.Tensor) -> torch.Tensor:
        return gathered(_image(network, sizes, own, _CENTRAL, core) for own in factors)

    return solved(image, gathered(problem.weight for problem in problems), factors[0][_CENTRAL])
