"""The forms that layers may be factorized into, by name."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.passes.factorization.forms import Form, LowRank
from regauge.passes.factorization.separated import Separated

FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (LowRank(), Separated("tucker", (0,)), Separated("columns", (0, 1)), Separated("rows", (0, 2)))
}
