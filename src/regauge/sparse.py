"""Weights with zeros, stored and computed with as such.

    packed = regauge.sparse.smallest(weight)          # in whichever layout takes the fewest bytes
    packed = regauge.sparse.NofM(2, 4).pack(weight)   # or in one of one's own choice
    weight = packed.unpack()
    left = regauge.sparse.use_sparse_kernels(module)  # linear layers 2:4 on sparse tensor cores

See :mod:`regauge.ir.storage.sparse_layouts`.
"""

from regauge.ir.storage.sparse_layouts import LAYOUTS as LAYOUTS
from regauge.ir.storage.sparse_layouts import Blocks as Blocks
from regauge.ir.storage.sparse_layouts import Coo as Coo
from regauge.ir.storage.sparse_layouts import Csr as Csr
from regauge.ir.storage.sparse_layouts import Dense as Dense
from regauge.ir.storage.sparse_layouts import Layout as Layout
from regauge.ir.storage.sparse_layouts import Masked as Masked
from regauge.ir.storage.sparse_layouts import NofM as NofM
from regauge.ir.storage.sparse_layouts import Packed as Packed
from regauge.ir.storage.sparse_layouts import register_layout as register_layout
from regauge.ir.storage.sparse_layouts import smallest as smallest
from regauge.passes.sparsity.kernels import use_sparse_kernels as use_sparse_kernels
