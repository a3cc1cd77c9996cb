"""Every option of the pruning passes on every model of the coverage list: see ``benchmarks/pruning_options.py``.

Slow: run it with ``pytest -m sweep``. It needs what ``test_coverage_sweep`` needs.
"""

import sys

import pytest
from benchmarks.model_case import SHARED
from benchmarks.pruning_options import TRIALS, rows_of
from benchmarks.zoo import names

from regauge.passes.pruning.score_table import SCORES

LIST = SHARED / "tools" / "coverage_models.py"
ANY = "sweep" in " ".join(sys.argv)
FINE = ("ok", "unchanged")
REFUSALS = ("cannot be met", "can be removed")  # of budgets and parts that a network does not have


@pytest.mark.sweep
@pytest.mark.skipif(not LIST.exists(), reason="the model list lies in shared/tools beside the repository")
@pytest.mark.parametrize("name", names() if ANY and LIST.exists() else ["any"])
def test_options_on_a_model(name: str) -> None:
    for library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library)
    rows = [row for row in rows_of(name, TRIALS) if row.verdict not in FINE]
    assert [row for row in rows if row.verdict != "refused" or not any(why in row.note for why in REFUSALS)] == []


def test_every_value_of_the_options_is_tried() -> None:
    tried = " ".join(trial.text for trial in TRIALS)
    scopes = ("uniform", "global", "isomorphic", "knapsack", "dp")
    assert not [name for name in SCORES if f"score={name}," not in tried]
    assert not [scope for scope in scopes if scope != "uniform" and f"scope={scope}" not in tried]
