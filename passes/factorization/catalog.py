"""The forms that layers may be factorized into, by name.

Structured forms of matrices, by the axes of inputs (k, i, n, q; a, b, c), outputs (l, j, m, p; x, y, z) and bonds:

monarch         two products by blocks with a transpose between them (Dao et al. 2022); with as many blocks at both ends
                the BlockShuffle of Wei et al. (2024, Building on Efficient Foundations)
block-dense     a product by blocks, then one with all (Wei et al. 2024)
block-diagonal  a product by blocks alone
btt             a block tensor train of three cores (Qiu et al. 2024, Compute Better Spent); with two it is Monarch
kronecker       a sum of Kronecker products (Van Loan and Pitsianis 1993), as PHM layers are (Zhang et al. 2021)
mpo             a matrix product operator of three sites (Gao et al. 2020); with two it is a sum of Kronecker products

faust           two to four sparse matrices (Le Magoarou and Gribonval 2016)
"""

from __future__ import annotations

from collections.abc import Mapping

from regauge.passes.factorization.forms import Form, LowRank
from regauge.passes.factorization.networks import Network
from regauge.passes.factorization.separated import Separated
from regauge.passes.factorization.sparse_products import SparseProduct
from regauge.passes.factorization.structured import Structured
from regauge.passes.factorization.tensor_convs import Cp, TensorTrain

_COMMON: tuple[Form, ...] = (
    LowRank(),
    Separated("tucker", (0,), third=True),
    Separated("tucker-1", (0,)),
    Separated("columns", (0, 1)),
    Separated("rows", (0, 2)),
)
_OF_KERNELS: tuple[Form, ...] = (Cp(), TensorTrain())
_STRUCTURED = (
    Structured("monarch", Network("ki", "lj", ("kjri", "jlkr"))),
    Structured("block-dense", Network("ki", "m", ("kri", "mkr"))),
    Structured("block-diagonal", Network("ki", "kl", ("kli",))),
    Structured("btt", Network("abc", "xyz", ("rxabc", "srxybc", "sxyzc"))),
    Structured("kronecker", Network("nq", "mp", ("spq", "smn")), paired=True),
    Structured("mpo", Network("abc", "xyz", ("rxa", "rsyb", "szc")), paired=True),
)
_SPARSE: tuple[Form, ...] = (SparseProduct(),)
FORMS: Mapping[str, Form] = {form.name: form for form in (*_COMMON, *_OF_KERNELS, *_STRUCTURED, *_SPARSE)}
UNASKED = tuple(form.name for form in _COMMON)  # those that are weighed where none is asked for
