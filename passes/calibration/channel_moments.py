"""What is known of the channels of a value without data: means and covariances over a Dim, from weights alone.

A layer's inputs are taken for white, so that the covariance of its outputs is W W', and their mean its bias. From there
on two readings:

    rows       as UDFC has it: batch norms are gains and shifts, activations are passed over. Nothing but the rows w_i
               and biases b_i of the layer with its batch norm folded in; sums add up.
    moments    a batch norm in inference knows mean and variance of what it gives, and values before an activation are
               taken for normal. With Hermite coefficients c_n(i) = E[f(m_i + s_i z) He_n(z)] / sqrt(n!) behind it

                   E[f(x_i) f(x_j)] = sum over n of c_n(i) c_n(j) r_ij^n        (Mehler 1866), r_ij the correlation

               Means and variances are those of f(x) itself (of a rectified normal, behind a relu); of the orders that
               are left out the variance is known too, and is taken to be correlated like the first of them.
    statistics each channel by itself, with the mean and variance that its own batch norm gives it: all that expected
               values need (Nagel et al. 2019, Data-Free Quantization, section 4.2.1). ``moments`` has the shape of
               W W', and the sum of the variances from the batch norm. What no batch norm has seen is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from regauge.ir.dims.extents import Dim, Extent, leaves, positions_on
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.passes.calibration.batch_norms import gain_of, is_fixed, shift_of
from regauge.passes.calibration.layers import Layer, layer_of

Reading: TypeAlias = Literal["rows", "moments", "statistics"]

_ORDERS = 12  # of Hermite polynomials
_POINTS = 513  # of the trapezoidal rule, which kinks do not disturb as they do Gauss's
_REACH = 9.0  # deviations to either side
_RECTIFIERS = {"relu", "leaky_relu", "hardtanh", "clamp", "elu", "celu", "selu", "gelu", "silu", "hardswish", "mish"}
_OTHERS = {"sigmoid", "hardsigmoid", "tanh", "softplus", "softsign"}  # not linear even by half
_POOLS = {"max_pool", "adaptive_max_pool"}
_SUMS = {"add", "sub"}
_AVERAGES = {"avg_pool", "adaptive_avg_pool", "mean"}


@dataclass(frozen=True)
class ChannelMoments:
    """Mean [entries, indices] and covariance [entries, indices, indices]; entries are those that an index owns."""

    mean: torch.Tensor
    covariance: torch.Tensor

    def gram(self, weight_of_mean: float = 1.0) -> torch.Tensor:
        """E[x x'] summed over entries, [indices, indices]."""
        outer = self.mean[:, :, None] * self.mean[:, None, :]
        return (self.covariance + weight_of_mean * outer).sum(0)


class ChannelReader:
    """Follows values back to the layers that make them; ``matrices`` are what these have by now, else their weights.

    With ``meant``, matrices in place of which others stand by now, every Dim has its indices twice: as they are, and
    behind these as they are meant to be.
    """

    def __init__(
        self,
        graph: Graph,
        reading: Reading,
        matrices: Mapping[Layer, torch.Tensor],
        meant: Mapping[Layer, torch.Tensor] | None = None,
    ) -> None:
        self.graph, self.reading = graph, reading
        self.kinds = [matrices] if meant is None else [matrices, meant]
        self._known: dict[tuple[Value, Dim], ChannelMoments | str] = {}

    def of(self, value: Value, dim: Dim) -> ChannelMoments | str:
        """The moments of a value over a Dim; or why they cannot be told."""
        known = self._known.get((value, dim))
        if known is None:
            known = self._of(value, dim)
            if len(value.uses) > 1:  # what has one reader is asked for once
                self._known[value, dim] = known
        return known

    def _of(self, value: Value, dim: Dim) -> ChannelMoments | str:
        node = value.producer
        if node is None or node not in self.graph.axes.calls:
            return "it is an input or a table"
        if layer_of(node, blocks=True, shared=True) is not None:
            if self.reading == "statistics":
                return "no batch norm stands between"
            return self._made_by(layer_of(node), node, dim)
        values = [one for one in node.inputs if isinstance(one, Value) and not isinstance(one, Parameter)]
        read = [one for one in values if self._has(one, dim)]
        if node.op in _SUMS and len(read) == 2 and all(own.shape == value.shape for own in read):
            return _summed(self.of(read[0], dim), self.of(read[1], dim), -1.0 if node.op == "sub" else 1.0)
        if not read and _adds_zeros(node):
            zeros = torch.zeros(1, len(self.kinds) * int(dim.size), dtype=torch.float64)
            return ChannelMoments(zeros, torch.diag_embed(zeros))
        activations = _RECTIFIERS if self.reading == "rows" else _RECTIFIERS | _OTHERS
        norm, alike = node.op == "batch_norm" and is_fixed(node), node.op in activations and not _parameters(node)
        if len(read) != 1 or not (norm or alike or node.op in _POOLS or self._moves(node)):
            return f"{node.op} stands between"
        if norm and self.reading == "statistics":
            return self._behind_norm(node, dim, None)
        before = self.of(read[0], dim)
        if isinstance(before, str):
            return before
        if norm:
            return self._behind_norm(node, dim, before)
        if self.reading == "statistics" and node.op == "pad":
            return self._among_zeros(node, dim, before)
        return _behind_activation(node, before) if alike and self.reading != "rows" else before

    def _among_zeros(self, node: Node, dim: Dim, before: ChannelMoments) -> ChannelMoments | str:
        """Of channels around which zeros are put, which count as much as what they surround."""
        if node.attributes["mode"] != "constant":
            return before
        share = 1.0
        for (first, last), size, extent in zip(
            node.attributes["pads"], node.output.shape, self.graph.axes.of[node.output], strict=True
        ):
            if dim in leaves(extent) or not (first or last):
                continue
            if not isinstance(size, int):
                return "zeros are put around it, and its sizes are not fixed"
            share *= (size - first - last) / size
        outer = before.mean[:, :, None] * before.mean[:, None, :]
        return ChannelMoments(share * before.mean, share * (before.covariance + (1 - share) * outer))

    def _made_by(self, layer: Layer | None, node: Node, dim: Dim) -> ChannelMoments | str:
        if layer is None:
            grouped = layer_of(node, blocks=True) is not None
            return "a grouped layer stands between" if grouped else "what makes it shares a weight"
        extent = self.graph.axes.of[layer.weight][layer.made]
        if leaves(extent).count(dim) != 1:
            return f"{node.op} on other axes stands between"
        places = self._places(extent, dim)
        weight, own = layer.matrix(layer.weight.tensor.detach()), places.chunk(len(self.kinds), 1)
        rows = torch.cat(
            [kind.get(layer, weight).double()[part] for kind, part in zip(self.kinds, own, strict=True)], 1
        )
        mean = torch.zeros(places.shape, dtype=torch.float64)
        if layer.bias is not None:
            mean = layer.bias.tensor.detach().double()[places]
        return ChannelMoments(mean, rows @ rows.mT)

    def _behind_norm(self, node: Node, dim: Dim, before: ChannelMoments | None) -> ChannelMoments | str:
        """Of channels as they were ``before``; without that they are taken for independent."""
        x, bias, variance = node.inputs[0], node.inputs[2], node.inputs[4]
        assert isinstance(x, Value) and isinstance(variance, Parameter)
        extent = self.graph.axes.of[x][1]
        if leaves(extent).count(dim) != 1:
            return "batch_norm on another axis stands between"
        places = self._places(extent, dim)
        if before is not None and len(places) != len(before.mean):
            return "a batch norm behind a reshape"
        gain = gain_of(node)[places]
        known = gain.square() * variance.tensor.detach().double()[places]
        mean = bias.tensor.detach().double()[places] if isinstance(bias, Parameter) else torch.zeros_like(gain)
        if before is None:
            return ChannelMoments(mean, torch.diag_embed(known))
        covariance = before.covariance * gain[:, :, None] * gain[:, None, :]
        if self.reading == "rows":
            return ChannelMoments(gain * before.mean + shift_of(node)[places], covariance)
        scale = known.sum() / covariance.diagonal(dim1=1, dim2=2).sum().clamp(min=1e-30)
        return ChannelMoments(mean, covariance * scale)

    def _places(self, extent: Extent, dim: Dim) -> torch.Tensor:
        """The places of a Dim's indices on an axis, [entries, indices]."""
        return torch.from_numpy(positions_on(extent, dim)).t().repeat(1, len(self.kinds))

    def _has(self, value: Value, dim: Dim) -> bool:
        return any(dim in leaves(extent) for extent in self.graph.axes.of[value])

    def _moves(self, node: Node) -> bool:
        """Whether a node is linear in what it reads, index by index, and has no other result and no constant to add.

        Scales are all the same to what channels are combinations of, but not to what they are on average.
        """
        if len(node.outputs) != 1 or node.regions or node.op in _SUMS or _parameters(node):
            return False
        if self.reading == "statistics":
            average = node.op in _AVERAGES and node.attributes.get("divisor_override") is None
            return average or symmetry_of(node) is Symmetry.LAYOUT
        if symmetry_of(node) is Symmetry.LINEAR:
            return sum(isinstance(operand, Value) for operand in node.inputs) == 1
        return symmetry_of(node) is Symmetry.LAYOUT


def _adds_zeros(node: Node) -> bool:
    """Whether a node puts zeros around what it reads."""
    return node.op == "pad" and node.attributes["mode"] == "constant" and symmetry_of(node) is Symmetry.LAYOUT


def _parameters(node: Node) -> bool:
    return any(isinstance(operand, Parameter) for operand in node.inputs)


def _summed(one: ChannelMoments | str, other: ChannelMoments | str, sign: float) -> ChannelMoments | str:
    """The moments of a sum of two independent values."""
    if isinstance(one, str) or isinstance(other, str):
        return one if isinstance(one, str) else other
    if one.mean.shape != other.mean.shape:
        return "its addends have other layouts"
    return ChannelMoments(one.mean + sign * other.mean, one.covariance + other.covariance)


def _behind_activation(node: Node, before: ChannelMoments) -> ChannelMoments:
    """Moments of f(x) for normal x."""
    points = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    weights = torch.exp(-points.square() / 2)
    weights = weights / weights.sum()
    deviation = before.covariance.diagonal(dim1=1, dim2=2).clamp(min=1e-24).sqrt()
    values = before.mean[..., None] + deviation[..., None] * points
    values = node.operator.evaluate(values, *node.inputs[1:], **node.attributes)
    coefficients = (values * weights) @ _hermite(points)  # [entries, indices, orders]
    mean = coefficients[..., 0]
    variance = (values - mean[..., None]).square() @ weights
    rest = (variance - coefficients[..., 1:].square().sum(-1)).clamp(min=0).sqrt()
    correlation = (before.covariance / (deviation[:, :, None] * deviation[:, None, :])).clamp(-1, 1)
    covariance, power = torch.zeros_like(correlation), torch.ones_like(correlation)
    for own in (*coefficients.unbind(-1)[1:], rest):
        power = power * correlation
        covariance += own[:, :, None] * own[:, None, :] * power
    return ChannelMoments(mean, covariance)


def _hermite(points: torch.Tensor) -> torch.Tensor:
    """The values [points, orders] of Hermite polynomials of unit norm under the normal law."""
    found = [torch.ones_like(points), points]
    for order in range(2, _ORDERS):
        found.append((points * found[-1] - (order - 1) ** 0.5 * found[-2]) / order**0.5)
    return torch.stack(found, 1)


def combinations(inner: torch.Tensor, across: torch.Tensor, ridge: float) -> torch.Tensor:
    """s = (G_KK + l2)^-1 G_KR, [kept, others]: of what kept channels G_KK = E[x_K x_K'] the others, which have the
    products G_KR with them, come nearest to. l2 is a ``ridge`` times the mean of the diagonal; of several solutions
    the least where G_KK is singular."""
    ridged = inner.clone()
    ridged.diagonal().add_(ridge * inner.diagonal().mean().clamp(min=1e-30))
    solved, failed = torch.linalg.solve_ex(ridged, across)
    if bool(failed) or not bool(solved.isfinite().all()):
        solved = torch.linalg.pinv(ridged, hermitian=True) @ across
    found: torch.Tensor = solved
    return found
