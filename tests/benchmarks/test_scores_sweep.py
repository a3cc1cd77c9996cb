"""Every score on every model of the coverage list: finite, and one for each index of each free Dim.

Slow: run it with ``pytest -m sweep``. It needs timm, torchvision, transformers and ``shared/tools`` beside the
repository.
"""

import sys

import numpy as np
import pytest
import torch
from benchmarks.zoo import SHARED, build, names, redraw
from torch.utils import _pytree

from regauge.frontends.capture import capture
from regauge.passes.calibration.losses import labelled
from regauge.passes.pruning.score_table import SCORES, score

LIST = SHARED / "tools" / "coverage_models.py"
ANY = "sweep" in " ".join(sys.argv)


@pytest.mark.sweep
@pytest.mark.skipif(not LIST.exists(), reason="the model list lies in shared/tools beside the repository")
@pytest.mark.parametrize("name", names() if ANY and LIST.exists() else ["any"])
def test_scores_of_a_model(name: str) -> None:
    case = build(name)
    redraw(case.model)
    graph = capture(case.model, case.args, case.kwargs, verify=False)
    groups = [group for group in graph.groups() if group.free]
    inputs = tuple(x for x in _pytree.tree_leaves((case.args, case.kwargs)) if isinstance(x, torch.Tensor))
    for criterion in SCORES:
        found = score(graph, groups, criterion, batches=[labelled(graph, inputs)])
        for group in groups:
            scores = found[group.dim]
            assert scores.shape == (group.size,) and np.isfinite(scores).all(), f"{criterion} of {group}"
