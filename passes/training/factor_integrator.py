"""The basis-update and Galerkin integrator of one factorized weight: a matrix, or a kernel in Tucker form.

    W = C x_o U_o x_i U_i      C [r_o, r_i, places], U_o [outputs, r_o], U_i [inputs, r_i] with orthonormal columns

A gradient step of W is made within its rank, without an inverse of small singular values: first the basis of each mode
takes a step, the rest of W being orthonormal (K_m = U_m R', Mat_m(C)' = Q R); then bases hold the old and the new
directions, and the core takes one; last the core is truncated. Where a bond has no room for both, bases hold the new
directions, and of the old ones those of most weight (with none of them this is the integrator of fixed rank).
Schotthöfer et al. 2022 (Low-rank lottery tickets, algorithm 1) for matrices, where C is S and the steps are called K, L
and S; Zangrando et al. 2023 (Geometry-aware training of factorized layers in tensor Tucker format) for Tucker.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from regauge.ir.graph import Parameter
from regauge.passes.calibration.layers import Layer
from regauge.passes.training.factor_pairs import Chain

PHASES = 3

Tensor = Callable[[Parameter], torch.Tensor]


class Integrator:
    """Holds C, U_o and U_i of one chain, writes them into the module's weights, and takes steps by their gradients."""

    def __init__(self, chain: Chain, tensor: Tensor, rate: float, tolerance: float) -> None:
        self.chain, self.tensor, self.rate, self.tolerance = chain, tensor, rate, tolerance
        up, down = (chain_layer.matrix(tensor(chain_layer.weight)).detach() for chain_layer in (chain.up, chain.down))
        if chain.core is None:
            core = torch.eye(up.shape[1], device=up.device)[..., None]
        else:
            core = chain.core.matrix(tensor(chain.core.weight)).detach().reshape(*chain.sizes, -1)
        self.core, self.bases = core, (up, down.mT)
        self._orthonormal()
        self.truncate(0.0)
        self.moved: list[torch.Tensor] = []

    @property
    def ranks(self) -> tuple[int, int]:
        """Directions in use, of outputs and of inputs."""
        return int(self.core.shape[0]), int(self.core.shape[1])

    # -- the three steps ---------------------------------------------------------------------------------------------

    def write(self, phase: int) -> None:
        """Put the weights into the module, in the basis that a phase takes its gradient in; W stays the same."""
        core, bases = self.core, list(self.bases)
        if phase < 2:
            q, r = torch.linalg.qr(_unfolded(core, phase).mT)
            bases[phase] = bases[phase] @ r.mT
            core = _folded(q.mT, phase, core)
        up, down = bases[0], bases[1].mT
        if self.chain.core is None:  # an orthogonal core of the first two phases goes to the other side
            up, down = (up, core[..., 0] @ down) if phase != 1 else (up @ core[..., 0], down)
        self._put(self.chain.up, up)
        self._put(self.chain.down, down)
        if self.chain.core is not None:
            self._put(self.chain.core, core)

    def step(self, phase: int) -> None:
        """Take the gradients of what :meth:`write` put there, and go on with the next phase."""
        if phase < 2:
            layer = self.chain.up if phase == 0 else self.chain.down
            own, gradient = (self._read(layer, t) for t in (self.tensor(layer.weight), self._gradient(layer)))
            rank = self.ranks[phase] if self.chain.core is not None else min(self.ranks)
            moved = (own - self.rate * gradient)[:, :rank] if phase == 0 else (own - self.rate * gradient)[:rank].mT
            self.moved.append(moved)
            if phase == 1:
                self._augment()
        else:
            self.core = self.core - self.rate * self._core_gradient()
            self.truncate(self.tolerance)
        self.write((phase + 1) % PHASES)

    def _augment(self) -> None:
        """Bases of the new and the old directions, where there is room for both, and the core in these."""
        core = self.core
        for mode, (moved, old) in enumerate(zip(self.moved, self.bases, strict=True)):
            basis, _ = torch.linalg.qr(torch.cat([moved, old], 1))
            if basis.shape[1] > self.chain.sizes[mode]:
                basis = _with_most(moved, old @ _unfolded(core, mode), self.chain.sizes[mode])
            core = _times(basis.mT @ old, core, mode)
            self.bases = (basis, self.bases[1]) if mode == 0 else (self.bases[0], basis)
        self.core, self.moved = core, []

    def _core_gradient(self) -> torch.Tensor:
        rank_o, rank_i = self.ranks
        if self.chain.core is None:
            gradient = self._read(self.chain.down, self._gradient(self.chain.down))[:rank_o]
            return (gradient @ self.bases[1])[..., None]
        layer = self.chain.core
        return self._read(layer, self._gradient(layer)).reshape(*self.chain.sizes, -1)[:rank_o, :rank_i]

    def truncate(self, tolerance: float) -> None:
        """Keep of each mode the fewest singular directions that lose at most this share of the norm, all modes
        together."""
        modes = 1 if self.chain.core is None else 2
        allowed = tolerance * float(self.core.norm()) / math.sqrt(modes)
        found = []
        for mode in (0, 1):
            left, values, _ = torch.linalg.svd(_unfolded(self.core, mode), full_matrices=False)
            tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
            rank = int((tails > max(allowed, 1e-7 * float(values[0]))).sum())
            found.append(left[:, : min(max(1, rank), self.chain.sizes[mode])])
        for mode, basis in enumerate(found):
            self.core = _times(basis.mT, self.core, mode)
        self.bases = (self.bases[0] @ found[0], self.bases[1] @ found[1])

    def _orthonormal(self) -> None:
        for mode in (0, 1):
            q, r = torch.linalg.qr(self.bases[mode])
            self.core = _times(r, self.core, mode)
            self.bases = (q, self.bases[1]) if mode == 0 else (self.bases[0], q)

    # -- the module's tensors ----------------------------------------------------------------------------------------

    def _gradient(self, layer: Layer) -> torch.Tensor:
        held = self.tensor(layer.weight)
        return torch.zeros_like(held) if held.grad is None else held.grad

    def _read(self, layer: Layer, stored: torch.Tensor) -> torch.Tensor:
        return layer.matrix(stored.detach())

    def _put(self, layer: Layer, part: torch.Tensor) -> None:
        """Write a part of a layer's weight, its first directions; the others are zero."""
        held = self.tensor(layer.weight)
        matrix = torch.zeros_like(layer.matrix(held))
        if part.dim() == 3:
            matrix.reshape(*self.chain.sizes, -1)[: part.shape[0], : part.shape[1]] = part
        else:
            matrix[: part.shape[0], : part.shape[1]] = part
        held.copy_(layer.stored(matrix))


def _with_most(moved: torch.Tensor, old: torch.Tensor, room: int) -> torch.Tensor:
    """An orthonormal basis of ``moved`` and of what it leaves most of in ``old``, [indices, room]."""
    basis, _ = torch.linalg.qr(moved)
    rest, _, _ = torch.linalg.svd(old - basis @ (basis.mT @ old), full_matrices=False)
    whole: torch.Tensor = torch.linalg.qr(torch.cat([basis, rest[:, : room - basis.shape[1]]], 1))[0]
    return whole


def _unfolded(core: torch.Tensor, mode: int) -> torch.Tensor:
    return core.movedim(mode, 0).flatten(1)


def _folded(matrix: torch.Tensor, mode: int, like: torch.Tensor) -> torch.Tensor:
    others = [size for axis, size in enumerate(like.shape) if axis != mode]
    return matrix.reshape(len(matrix), *others).movedim(0, mode)


def _times(matrix: torch.Tensor, core: torch.Tensor, mode: int) -> torch.Tensor:
    return _folded(matrix @ _unfolded(core, mode), mode, core)
