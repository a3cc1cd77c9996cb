"""What the gradients of attention cost where no program holds a head, and whether kernels of them gain.

The gradients of a score take products of as many numbers as queries and keys have (d) or values (e):

    statistics      d + e                        scores, and gradients of weights
    of queries      c * (d + e + w)              both again in each of c programs, which have w numbers of d each
    of keys         c * (d + e + w)
    of values       c' * (d + w')                scores again in each of c' programs, which have w' numbers of e each

That is 10 d for heads of 512 numbers. Where each score is computed once and kept, 3 d + 3 e do, the ones of the forward
pass, which is run again, among them; but scores, weights and the gradients of both are then written and read as
matrices, also those that a causal mask leaves nothing of, which kernels skip. Either takes as long as the roofline says
that its arithmetic and bytes do (:mod:`regauge.ir.roofline`); of long sequences all else is nothing beside scores.
"""

from __future__ import annotations

from typing import Any

from regauge.ir.cost import item_size
from regauge.ir.fusion.attention import Attention, causal_bound
from regauge.ir.fusion.region import terms_below
from regauge.ir.roofline import DEVICES
from regauge.ir.sizes.expressions import product

WIDEST_GRADIENT = 512
"""Numbers of a head of which a program keeps the gradient."""

KEPT = 5
"""How often an entry of a matrix of scores is written or read by the softmax (2) and its gradient (3); products of wide
heads wait for arithmetic, not for memory."""


def block_of(numbers: int) -> int:
    """Numbers of a head of which a program keeps the gradient, a power of two."""
    return min(WIDEST_GRADIENT, max(16, 1 << max(0, numbers - 1).bit_length()))


def products_of(head: int, columns: int) -> int:
    """How many numbers the kernels of the gradients multiply for a score; see the module docstring."""
    parts, blocks = ([-(-one // block_of(one)), block_of(one)] for one in (head, columns))
    of_queries = parts[0] * (head + columns + parts[1])
    return head + columns + 2 * of_queries + blocks[0] * (head + blocks[1])


def loss_of(parts: Attention, dtype: Any) -> str:
    """Why kernels of the gradients would not gain; nothing where they do."""
    head, columns = (int(product(dim.size for dim in dims)) for dims in (parts.head, parts.columns))
    gpu, kernels, kept = DEVICES["gpu"], products_of(head, columns), 3 * (head + columns)
    share = 0.5 if causal_bound(parts) is not None else 1.0
    behind = [term for term in {*terms_below(parts.logits), parts.logits} if parts.scores in terms_below(term)]
    steps = sum(term.op != "result" for term in behind)  # each of which is two steps, with its derivative
    moved = (KEPT + 4 * steps) * item_size(dtype)
    own, other = share * 2 * kernels / gpu.flops, 2 * kept / gpu.flops + moved / gpu.bandwidth
    if own <= other:
        return ""
    return (
        f"kernels of the gradients of heads of {head} and values of {columns} numbers would multiply "
        f"{share * kernels:g} numbers for a score, and take longer than to multiply {kept} and move {moved} bytes of it"
    )
