"""The forms that layers may be factorized into, by name."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.passes.factorization.forms import Form, LowRank
from regauge.passes.factorization.separated import Separated
from regauge.passes.factorization.tensor_convs import Cp, TensorTrain

FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        LowRank(),
        Separated("tucker", (0,)),
        Separated("columns", (0, 1)),
        Separated("rows", (0, 2)),
        Cp(),
        TensorTrain(),
    )
}
UNASKED = ("low-rank", "tucker", "columns", "rows")  # those that are weighed where none is asked for
