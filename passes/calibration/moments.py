"""Second moments of a layer's input, and of what its output should be: all that least squares needs of the data."""

from __future__ import annotations

import torch

from regauge.ir.errors import PassError

_ROWS = 1 << 15  # rows that are multiplied at a time: the products are exact enough in float32, their sums are not


class Moments:
    """Sums over rows, in double precision: ``gram`` = X'X and ``cross`` = Y'X, X with a column of ones behind it.

    Memory: columns x (columns + outputs) doubles, however many rows are added.
    """

    def __init__(self, columns: int, outputs: int = 0) -> None:
        self.gram = torch.zeros(columns + 1, columns + 1, dtype=torch.float64)
        self.cross = torch.zeros(outputs, columns + 1, dtype=torch.float64)
        self.rows = 0

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Add rows of inputs [rows, columns], and of wanted outputs [rows, outputs]."""
        for start in range(0, len(x), _ROWS):
            part = x[start : start + _ROWS].float()
            part = torch.cat([part, part.new_ones(len(part), 1)], 1)
            self.gram += (part.t() @ part).double()
            if y is not None:
                self.cross += (y[start : start + _ROWS].float().t() @ part).double()
        self.rows += len(x)

    def check(self, layer: str) -> None:
        """Raise PassError, naming the layer, where what was added is not finite."""
        if not bool(self.cross.isfinite().all() and self.gram.isfinite().all()):
            raise PassError(f"{layer} gets or gives infinite numbers on the calibration data")


def ridge(gram: torch.Tensor, share: float) -> torch.Tensor:
    """What is added to the diagonal: a share of its mean, for all but the column of ones behind it."""
    amount = torch.full((len(gram),), float(gram.diag()[:-1].mean()) * share, dtype=gram.dtype)
    amount[-1] = 0
    return amount.clamp_(min=1e-12)


def least_squares(found: Moments, before: torch.Tensor, share: float, *, bias: bool) -> torch.Tensor:
    """[outputs, columns + 1]: the weight and, in the last column, the bias that give the wanted outputs most closely.

    Minimises |Y - X W'|^2 + r |W - W0|^2, with W0 = ``before`` of the same shape and r a ``share`` of the mean square
    of a column: where the data says nothing, the weight stays. Without ``bias`` the last column stays as it was.
    """
    gram, cross = found.gram, found.cross
    if not bias:
        cross = cross - before[:, -1:] * gram[-1:]
        gram, cross = gram[:-1, :-1], cross[:, :-1]
        amount = torch.full((len(gram),), float(gram.diag().mean()) * share, dtype=gram.dtype).clamp_(min=1e-12)
        return torch.cat([_solved(gram, cross, before[:, :-1], amount), before[:, -1:]], 1)
    return _solved(gram, cross, before, ridge(gram, share))


def _solved(gram: torch.Tensor, cross: torch.Tensor, before: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.solve(gram + amount.diag(), (cross + before * amount).t())
    return found.t()
