"""Sparsity and few bits while training: objects beside the optimizer of any torch training loop.

    sparsifier = regauge.training.Hesso(model, graph, regauge.training.Target(macs=0.5), warmup=200)
    ...  # loss = loss + sparsifier.loss(); after optimizer.step(): sparsifier.step()
    small = sparsifier.finish()

See :mod:`regauge.passes.training.sparsifier` for the protocol, and :mod:`regauge.passes.training.qat` for few bits.
"""

from regauge.passes.elastic.supernet import Supernet as Supernet
from regauge.passes.training.distillation import Distillation as Distillation
from regauge.passes.training.distillation import feature_distance as feature_distance
from regauge.passes.training.distillation import soft_cross_entropy as soft_cross_entropy
from regauge.passes.training.dlrt import Dlrt as Dlrt
from regauge.passes.training.factors import full_rank_factors as full_rank_factors
from regauge.passes.training.gradual import GradualGroups as GradualGroups
from regauge.passes.training.gradual import GradualWeights as GradualWeights
from regauge.passes.training.hesso import Cric as Cric
from regauge.passes.training.hesso import Hesso as Hesso
from regauge.passes.training.hsm import Hsm as Hsm
from regauge.passes.training.lapp import Lapp as Lapp
from regauge.passes.training.learned_levels import LearnedLevels as LearnedLevels
from regauge.passes.training.nm_sparsity import NMSparsity as NMSparsity
from regauge.passes.training.ordered_dropout import OrderedDropout as OrderedDropout
from regauge.passes.training.qat import Qat as Qat
from regauge.passes.training.query_key import query_key_products as query_key_products
from regauge.passes.training.self_guided import SelfGuided as SelfGuided
from regauge.passes.training.sparse_momentum import SparseMomentum as SparseMomentum
from regauge.passes.training.sparsifier import Sparsifier as Sparsifier
from regauge.passes.training.target import Target as Target
from regauge.passes.training.templates import Templates as Templates
from regauge.passes.training.vib import Vib as Vib
