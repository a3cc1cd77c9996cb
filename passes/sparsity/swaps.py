"""Bettering a mask: a kept and a removed entry of a row change places while that lowers the row's error.

Exact: the error is that of the row with all its weights refitted. With S what a row keeps, the sweep operator
(Goodnight 1979, A Tutorial on the SWEEP Operator) holds all that is asked of H and S in one symmetric table, the kept
entries swept:

    T_SS = -[H_SS]^-1      T_SP = [H_SS]^-1 H_SP      T_PP = H_PP - H_PS [H_SS]^-1 H_SP
    t_S  = the refitted weights                       t_P  = the gradient of the error where entries are zero

Taking j in gains t_j^2 / T_jj, and giving i up after that costs (t_i - T_ij t_j / T_jj)^2 / (T_ij^2 / T_jj - T_ii);
either changes the table by a rank-one update. All rows of a chunk do their best exchange at once, until none has one.
"""

from __future__ import annotations

import torch

from regauge.passes.calibration.quadratic import Quadratic

_BYTES = 256 << 20  # of tables that are held at a time
_WIDEST = 32  # inputs of a row all of whose pairs are looked at
_SHORTLIST = 16  # entries on either side that are looked at where a whole row is the group
_LEAST_GAIN = 1e-6  # share of a row's error that an exchange has to save


def exchange(problem: Quadratic, kept: torch.Tensor, group: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bettered mask and the refitted weight, both [outputs, columns].

    Entries change places within groups of ``group`` neighbours, or anywhere in a row where ``group`` is its length, at
    most ``most`` times per row. Costs memory and time of columns^2 per row and exchange, and to begin with a third of
    columns^3 per row, where half of the entries are kept.
    """
    columns = kept.shape[1]
    chunk = max(1, _BYTES // (8 * columns * columns))
    kept, weight = kept.clone(), torch.zeros_like(problem.optimum)
    for start in range(0, len(kept), chunk):
        rows = slice(start, start + chunk)
        table = _Tables(problem, kept[rows], rows)
        table.exchange(group, most)
        kept[rows] = table.kept
        weight[rows] = table.vector * table.kept
    return kept, weight


class _Tables:
    """The swept tables [rows, columns, columns] and vectors [rows, columns] of some rows."""

    def __init__(self, problem: Quadratic, kept: torch.Tensor, rows: slice) -> None:
        self.kept = kept.clone()
        hessian, optimum = problem.hessian, problem.optimum[rows]
        target = optimum @ hessian
        self.table = hessian.new_empty(len(kept), *hessian.shape)
        self.vector = torch.empty_like(target)
        for row, mask in enumerate(kept):  # one by one: of the whole only the parts between S and P are computed
            self._start(row, mask.nonzero()[:, 0], (~mask).nonzero()[:, 0], hessian, target[row])
        off = self.vector * self.kept - optimum
        self.loss = ((off @ hessian) * off).sum(1)

    def _start(
        self, row: int, inside: torch.Tensor, outside: torch.Tensor, hessian: torch.Tensor, target: torch.Tensor
    ) -> None:
        """Fill the table and the vector of a row that keeps the entries ``inside``."""
        between = hessian[inside][:, outside]
        inverse = torch.linalg.inv(hessian[inside][:, inside])
        across = inverse @ between  # [H_SS]^-1 H_SP
        table = self.table[row]
        table[inside[:, None], inside] = -inverse
        table[inside[:, None], outside] = across
        table[outside[:, None], inside] = across.t()
        table[outside[:, None], outside] = hessian[outside][:, outside] - between.t() @ across
        weight = inverse @ target[inside]
        self.vector[row, inside] = weight
        self.vector[row, outside] = target[outside] - between.t() @ weight

    def exchange(self, group: int, most: int) -> None:
        """Exchange entries until no row has an exchange that lowers its error, at most ``most`` times."""
        self.active = torch.ones(len(self.kept), dtype=torch.bool)
        whole = group == self.kept.shape[1] > _WIDEST
        for _ in range(most):
            change, goes, comes = self._best_of_shortlist() if whole else self._best(group)
            self.active &= change < -_LEAST_GAIN * self.loss
            if not self.active.any():
                return
            self._replace(goes, comes)
            self.loss += torch.where(self.active, change, 0)

    def _best(self, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each row the change of the error by its best exchange, the entry that goes and the one that comes."""
        count, columns = self.kept.shape
        pieces = self.table.view(count, columns // group, group, columns // group, group)
        across = pieces.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [rows, groups, goes, comes]
        diagonal = self.table.diagonal(dim1=1, dim2=2).reshape(count, -1, group)
        vector = self.vector.view(count, -1, group)
        inside = self.kept.view(count, -1, group)
        new = vector / diagonal  # the weight that an entry gets when it comes
        weight = vector[:, :, :, None] - across * new[:, :, None, :]
        cost = weight.square() / (across.square() / diagonal[:, :, None, :] - diagonal[:, :, :, None])
        change = cost - (vector * new)[:, :, None, :]
        change = torch.where(inside[:, :, :, None] & ~inside[:, :, None, :], change, torch.inf)
        best, place = change.reshape(count, -1).min(1)
        number, goes, comes = torch.unravel_index(place, change.shape[1:])
        return best, number * group + goes, number * group + comes

    def _best_of_shortlist(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`_best`, for whole rows: of the entries that cost least to give up, and those that gain most."""
        every = torch.arange(len(self.kept))[:, None]
        diagonal = self.table.diagonal(dim1=1, dim2=2)
        worth = self.vector.square() / diagonal  # negative of the cost where kept, else the gain
        goes = torch.where(self.kept, worth, -torch.inf).topk(_SHORTLIST, 1).indices
        comes = torch.where(self.kept, -torch.inf, worth).topk(_SHORTLIST, 1).indices
        across = self.table[every[:, :, None], goes[:, :, None], comes[:, None, :]]
        step = (self.vector / diagonal)[every, comes]
        weight = self.vector[every, goes][:, :, None] - across * step[:, None, :]
        left = across.square() / diagonal[every, comes][:, None, :] - diagonal[every, goes][:, :, None]
        change = weight.square() / left - worth[every, comes][:, None, :]
        valid = self.kept[every, goes][:, :, None] & ~self.kept[every, comes][:, None, :]
        best, place = torch.where(valid, change, torch.inf).reshape(len(change), -1).min(1)
        one, other = place // _SHORTLIST, place % _SHORTLIST
        return best, goes[every[:, 0], one], comes[every[:, 0], other]

    def _replace(self, goes: torch.Tensor, comes: torch.Tensor) -> None:
        """In every active row one entry comes and one goes: two sweeps, made in one pass over the table."""
        every = torch.arange(len(goes))
        first, p, own = self._line(comes)
        enters = first / p[:, None]  # the row of what comes, after its sweep
        enters[every, comes] = -1 / p
        other, _, _ = self._line(goes)
        second = other - first * (other[every, comes] / p)[:, None]
        second[every, comes] = other[every, comes] / p
        q = second[every, goes]
        leaves = -second / q[:, None]
        leaves[every, goes] = -1 / q
        enters_then = enters - second * (second[every, comes] / q)[:, None]
        enters_then[every, goes] = leaves[every, comes]
        self._sweep_vector(comes, first, p, own, enter=True)
        self._sweep_vector(goes, second, q, self.vector[every, goes], enter=False)
        on = self.active.to(first.dtype)[:, None]
        left = torch.stack([first, second], 2)
        right = torch.stack([first * on / p[:, None], second * on / q[:, None]], 1)
        self.table.baddbmm_(left, right, alpha=-1)
        for entry, line in ((comes, enters_then), (goes, leaves)):
            rows, entry, line = every[self.active], entry[self.active], line[self.active]
            self.table[rows, entry] = line
            self.table[rows, :, entry] = line
            self.kept[rows, entry] ^= True

    def _line(self, entry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A line of the symmetric table for each row, its pivot, and the entry of the vector."""
        every = torch.arange(len(entry))
        line = self.table[every, entry]
        return line, line[every, entry], self.vector[every, entry]

    def _sweep_vector(
        self, entry: torch.Tensor, line: torch.Tensor, pivot: torch.Tensor, own: torch.Tensor, *, enter: bool
    ) -> None:
        every, on = torch.arange(len(entry)), self.active
        after = self.vector - line * (own / pivot)[:, None]
        after[every, entry] = own / pivot if enter else -own / pivot
        self.vector = torch.where(on[:, None], after, self.vector)
