"""Second moments of a layer's input, and of what its output should be: all that least squares needs of the data."""

from __future__ import annotations

import torch

from regauge.ir.errors import PassError
from regauge.ir.memory.mapped import mapped
from regauge.ir.storage.weights import file_of

_ROWS = 1 << 15  # rows that are multiplied at a time: products about means are exact enough in float32, sums are not
_DOUBLE = 2048  # systems up to this size are kept and solved in double precision, larger ones in single


class Moments:
    """Sums over rows: ``gram`` = X'X and ``cross`` = Y'X, X with a column of ones behind it; Y'Y of each output.

    While fewer rows than columns were added, the rows themselves are kept: they are smaller than their moments, and
    what is solved is a system of their number (the dual form of ridge regression). Memory: at most columns x (columns
    + outputs) numbers, of 8 bytes up to 2048 columns and of 4 above.
    """

    def __init__(self, columns: int, outputs: int = 0) -> None:
        self.columns, self.outputs = columns, outputs
        self.dtype = torch.float64 if columns <= _DOUBLE else torch.float32
        self.squares = torch.zeros(outputs, dtype=torch.float64)
        self.rows = 0
        self._kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._summed: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, gram: torch.Tensor, cross: torch.Tensor, rows: int) -> Moments:
        """Of sums that are at hand, over so many rows; |Y|^2 is not known of them."""
        found = cls(len(gram) - 1, len(cross))
        found._summed = (gram.to(found.dtype), cross.to(found.dtype))
        found.rows = rows
        return found

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Add rows of inputs [rows, columns], and of wanted outputs [rows, outputs]."""
        self.rows += len(x)
        if y is not None:
            for start in range(0, len(y), _ROWS):
                self.squares += y[start : start + _ROWS].double().square().sum(0)
        if self._summed is None and self.rows < self.columns:
            self._kept.append((x, y))
            return
        self.sums()
        self._sum(x, y)

    def merge(self, other: Moments) -> None:
        """Add all that was added to another, which is of no use afterwards."""
        for mine, theirs in zip(self.sums(), other.sums(), strict=True):
            mine += theirs
        self.squares += other.squares
        self.rows += other.rows

    @property
    def gram(self) -> torch.Tensor:
        """X'X, [columns + 1, columns + 1], in double precision."""
        return self.sums()[0].double()

    @property
    def cross(self) -> torch.Tensor:
        """Y'X, [outputs, columns + 1], in double precision."""
        return self.sums()[1].double()

    @property
    def scarce(self) -> bool:
        """Whether there are fewer rows than columns: they are at hand, see :meth:`kept_rows`."""
        return self._summed is None

    def kept_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """X [rows, columns] and Y [rows, outputs] where they are scarce."""
        x = torch.cat([x.to(self.dtype) for x, _ in self._kept]) if self._kept else torch.zeros(0, self.columns)
        wanted = [y.to(self.dtype) for _, y in self._kept if y is not None]
        return x.to(self.dtype), torch.cat(wanted) if wanted else torch.zeros(len(x), 0, dtype=self.dtype)

    def rows_as_given(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in the types in which they were added."""
        x, y = zip(*self._kept, strict=True)
        return torch.cat(x), torch.cat(y)

    def check(self, layer: str) -> None:
        """Raise PassError, naming the layer, where what was added is not finite."""
        numbers = (*(x for x, _ in self._kept), self.squares, *(self._summed or ()))
        if not all(bool(part.isfinite().all()) for part in numbers):
            raise PassError(
                f"{layer} gets or gives NaN or infinite numbers on the calibration data: look for them in it"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that are held in memory."""
        held = [*(self._summed or ()), *(part for pair in self._kept for part in pair if part is not None)]
        return sum(part.nbytes for part in held if file_of(part) is None)

    def set_aside(self) -> None:
        """Move what is held into temporary files, which are mapped; more can be added as before."""
        self._kept = [(mapped(x), None if y is None else mapped(y)) for x, y in self._kept]
        if self._summed is not None:
            gram, cross = self._summed
            self._summed = (mapped(gram), mapped(cross))

    def means(self) -> torch.Tensor:
        """The mean of each column."""
        count = max(1, self.rows)
        return self.kept_rows()[0].sum(0) / count if self.scarce else self.sums()[0][-1, :-1] / count

    def centred(self) -> torch.Tensor:
        """(X - mean)'(X - mean), [columns, columns]: what is left once constants are taken out."""
        if self.scarce:
            x = self.kept_rows()[0]
            x = x - x.mean(0) if len(x) else x
            return x.t() @ x
        mean = self.means()
        return self.sums()[0][:-1, :-1] - self.rows * torch.outer(mean, mean)

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """|Y - X W' - b|^2 over all rows, of a weight [outputs, columns] and a bias [outputs]."""
        if self.scarce:
            x, y = self.kept_rows()
            return float((y - x @ weight.to(x.dtype).t() - bias.to(x.dtype)).double().square().sum())
        both = torch.cat([weight, bias[:, None].to(weight.dtype)], 1).to(self.dtype)
        gram, cross = self.sums()
        changed = ((both @ gram) - 2 * cross).mul_(both)
        return float(self.squares.sum() + changed.double().sum())

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``gram`` and ``cross`` in the precision in which they are held; rows that were kept are summed up for it."""
        if self._summed is None:
            size = self.columns + 1
            self._summed = (
                torch.zeros(size, size, dtype=self.dtype),
                torch.zeros(self.outputs, size, dtype=self.dtype),
            )
            for x, y in self._kept:
                self._sum(x, y)
            self._kept = []
        return self._summed

    def _sum(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        assert self._summed is not None
        add = _add_about_means if self.dtype == torch.float64 else _add_as_they_are
        for start in range(0, len(x), _ROWS):
            add(*self._summed, x[start : start + _ROWS], None if y is None else y[start : start + _ROWS])


def _add_about_means(gram: torch.Tensor, cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None) -> None:
    """Add X'X and Y'X with products, in single precision, of what is left when the means of these rows are taken out.

    What the means give is added in double precision: of inputs that hardly vary, products of the rows as they are would
    leave nothing but rounding once a mean is taken out of the sums, and a matrix that is indefinite.
    """
    x, sums, mean = _about_mean(x)
    gram[:-1, :-1] += x.t() @ x
    if y is not None:
        y, left, own = _about_mean(y)
        cross[:, :-1] += y.t() @ x
    sums, mean = (torch.cat([part, part.new_tensor([end])]) for part, end in ((sums, 0.0), (mean, 1.0)))
    half = torch.outer(sums + len(x) / 2 * mean, mean)
    gram += half
    gram += half.t()
    if y is not None:
        cross += torch.outer(own, sums) + torch.outer(left + len(x) * own, mean)


def _about_mean(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows less about their mean, in single precision; the sums of what that leaves, and the mean that was taken."""
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(0)  # any number near it will do: the sums of what it leaves are added
    rest = (x - mean).float()
    return rest, rest.sum(0, dtype=torch.float64), mean.double()


def _add_as_they_are(gram: torch.Tensor, cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None) -> None:
    """Add X'X and Y'X where they are held in single precision, in place."""
    x = torch.cat([x.float(), x.new_ones(len(x), 1, dtype=torch.float32)], 1)
    gram.addmm_(x.t(), x)
    if y is not None:
        cross.addmm_(y.float().t(), x)


class Halves:
    """The moments of each half of the data, so that what was fitted to one can be judged by the other.

    What is added goes to the two in turn; of a single batch each gets half of the rows.
    """

    def __init__(self, columns: int, outputs: int) -> None:
        self.columns, self.outputs = columns, outputs
        self._parts = (Moments(columns, outputs), Moments(columns, outputs))
        self._first: tuple[torch.Tensor, torch.Tensor] | None = None
        self._turn = 0

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def parts(self) -> tuple[Moments, Moments]:
        """The two halves, of all that was added so far."""
        if self._first is not None:
            x, y = self._first
            middle = len(x) // 2
            self._parts[0].add(x[:middle], y[:middle])
            self._parts[1].add(x[middle:], y[middle:])
            self._first = None
        return self._parts

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add rows of inputs [rows, columns], and of wanted outputs [rows, outputs]."""
        if self._turn == 0:
            self._first = (x, y)
        else:
            if self._first is not None:
                self._parts[0].add(*self._first)
                self._first = None
            self._parts[self._turn % 2].add(x, y)
        self._turn += 1

    def check(self, layer: str) -> None:
        """Raise PassError, naming the layer, where what was added is not finite."""
        for part in self.parts:
            part.check(layer)

    def together(self) -> Moments:
        """The moments of all rows; the halves are not to be used afterwards where these are many."""
        one, other = self.parts
        if one.scarce and other.scarce:
            found = Moments(self.columns, self.outputs)
            for part in (one, other):
                if part.rows:
                    found.add(*part.kept_rows())
            return found
        one.merge(other)
        return one


def inverse(found: Moments, share: float) -> torch.Tensor:
    """((X - mean)'(X - mean) + r I)^-1, [columns, columns], r a ``share`` of the mean square of a column.

    Of scarce rows by the identity (X'X + r)^-1 = (1 - X'(XX' + r)^-1 X) / r.
    """
    amount = _amount(found, share)
    if found.scarce:
        x = found.kept_rows()[0]
        x = x - x.mean(0) if len(x) else x
        half: torch.Tensor = torch.linalg.solve_triangular(factor_of(x @ x.t(), amount), x, upper=False)
        result = half.t() @ half
        result.neg_().diagonal().add_(1)
        result.div_(amount)
    else:
        result = torch.cholesky_inverse(factor_of(found.centred(), amount))
    return result


def least_squares(found: Moments, before: torch.Tensor, share: float, *, bias: bool) -> torch.Tensor:
    """[outputs, columns + 1]: the weight and, in the last column, the bias that give the wanted outputs most closely.

    Minimises |Y - X W'|^2 + r |W - W0|^2, with W0 = ``before`` of the same shape and r a ``share`` of the mean square
    of a column: where the data says nothing, the weight stays. Without ``bias`` the last column stays as it was.
    """
    if not found.rows:
        return before
    amount = _amount(found, share)
    weight, shift = before[:, :-1].to(found.dtype), before[:, -1].to(found.dtype)
    if found.scarce:
        x, y = found.kept_rows()
        mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (x.new_zeros(found.columns), shift)
        x, y = x - mean_x, y - mean_y
        rest = y - x @ weight.t()
        solved = weight + torch.cholesky_solve(rest, factor_of(x @ x.t(), amount)).t() @ x
    else:
        (gram, cross), count = found.sums(), max(1, found.rows)
        mean_x, mean_y = gram[-1, :-1] / count, cross[:, -1] / count
        if bias:
            wanted = cross[:, :-1] - count * torch.outer(mean_y, mean_x)
            inner = found.centred()
        else:
            wanted, inner = cross[:, :-1] - torch.outer(shift, gram[-1, :-1]), gram[:-1, :-1]
        rest = wanted - weight @ inner
        solved = weight + torch.cholesky_solve(rest.t(), factor_of(inner, amount)).t()
    shift = mean_y - solved @ mean_x if bias else shift
    return torch.cat([solved, shift[:, None]], 1).to(before.dtype)


def _amount(found: Moments, share: float) -> float:
    """The ridge: a share of the mean square of a column, summed over the rows."""
    if found.scarce:
        square = float(found.kept_rows()[0].square().sum())
    else:
        square = float(found.sums()[0].diag()[:-1].sum())
    return ridge_of(square, found.columns, share)


def ridge_of(square: float, columns: int, share: float) -> float:
    """A share of the mean square of a column, of columns with so much as the sum of all squares."""
    return max(share * square / max(1, columns), 1e-12)


def factor_of(matrix: torch.Tensor, amount: float) -> torch.Tensor:
    """The lower Cholesky factor of a matrix with a ridge; the ridge grows where rounding has left it indefinite."""
    for _ in range(8):
        ridged = matrix.clone()
        ridged.diagonal().add_(amount)
        factor: torch.Tensor
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not int(failed):
            return factor
        del ridged, factor
        amount = max(10 * amount, 1e-7 * float(matrix.diagonal().abs().max()))
    raise PassError("the moments of the calibration data have no Cholesky factor: are its numbers finite?")
