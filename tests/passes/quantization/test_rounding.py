import torch

from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.quantization.grid import Coded, Form, Grid
from regauge.passes.quantization.rounding import by_columns, by_descent


def problem(rows: int = 24, columns: int = 64) -> Quadratic:
    """Inputs of which neighbours go together, some far larger than others."""
    x = torch.randn(2000, columns, dtype=torch.float64).cumsum(1) * torch.linspace(0.1, 3, columns).double()
    hessian = x.t() @ x + torch.eye(columns, dtype=torch.float64)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    zero = torch.zeros(columns, dtype=torch.float64)
    return Quadratic(hessian, weight, zero, torch.zeros(rows, dtype=torch.float64))


def start(given: Quadratic, grid: Grid, group: int) -> Coded:
    return Form(grid, group).rounded(given.optimum, given.hessian.diag())


def test_columns_make_up_for_one_another_and_descent_gains_on_them() -> None:
    given = problem()
    for bits, symmetric in ((4, True), (3, False), (2, False)):
        grid = Grid(bits, symmetric)
        losses = [
            float(given.losses(coded.values).sum())
            for coded in (
                Form(grid, 16).rounded(given.optimum),
                by_columns(given, start(given, grid, 16)),
                by_descent(given, start(given, grid, 16)),
            )
        ]
        assert losses[1] < 0.25 * losses[0] and losses[2] < 0.92 * losses[1]


def test_codes_stay_on_their_grid() -> None:
    for grid in (Grid(3), Grid(3, symmetric=False)):
        given = problem()
        coded = by_descent(given, start(given, grid, 32))
        assert torch.equal(coded.codes, coded.codes.round()) and float(coded.scale.min()) > 0
        assert grid.low <= float(coded.codes.min()) and float(coded.codes.max()) <= grid.high


def test_more_columns_than_are_updated_at_once() -> None:
    """What lies behind a block of columns gets its updates, in both."""
    given = problem(rows=4, columns=192)
    nearest = float(given.losses(Form(Grid(4), 192).rounded(given.optimum).values).sum())
    for solve in (by_columns, by_descent):
        assert float(given.losses(solve(given, start(given, Grid(4), 192)).values).sum()) < 0.1 * nearest
