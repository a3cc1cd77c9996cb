"""Factors of weights alone, and biases that make up for the mean of what they change.

With W' in place of W a layer gives (W' - W) E[x] more on average, which its bias, or the batch norm behind it, takes
back (Nagel et al. 2019, Data-Free Quantization, section 4.2, for weights that are rounded); E[x] is what batch norms
in front say (:mod:`regauge.passes.calibration.expected_inputs`).

Deviations that batch norms tell, too, are not used: errors in units of what layers read and give lost more (the logits
of a residual network factorized by Tucker-2 had a squared error of 0.87 of their variance, and 0.65 without).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.passes.calibration.expected_inputs import ExpectedInputs
from regauge.passes.calibration.layers import Layer, matrices_of
from regauge.passes.factorization.blocks import links_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.problems import plain_problems


def links_without_data(
    original: Graph, changed: Graph, layers: Sequence[Layer], picked: Mapping[str, Choice], *, by: str
) -> Iterator[tuple[Layer, list[Link], bool]]:
    """The links of ``layers``, those of ``changed``, a copy of ``original``; and whether a bias was corrected for each.

    Biases are written into ``changed``.
    """
    expected = ExpectedInputs(original)
    for layer in layers:
        choice = picked[layer.weight.name]
        links, matrices = links_of(FORMS[choice.form], plain_problems(layer), choice.numbers)
        mean, shifted = expected.of(layer), None
        if isinstance(mean, torch.Tensor):
            lost = matrices_of(layer) - matrices
            shifted = layer.shifted(torch.einsum("boc,bc->bo", lost, mean).reshape(-1))
        if shifted is not None:
            set_weight(changed, *shifted, by=by)
        yield layer, links, shifted is not None
