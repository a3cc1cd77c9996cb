"""Repairs of Triton's interpreter for bfloat16, which it keeps as bits in unsigned integers and mistakes for numbers.

It cuts float32 off where hardware rounds to the nearest, takes integers for bits, and multiplies bits in ``tl.dot``
(triton issues 11584 and 11585, closed as not supported). What it reduces with a function of the kernel's own it takes
entry by entry, which is slow: here whole slices. Triton 3.6 takes an array of one entry for a number, which numpy has
since given up. A truth value that is made a tile becomes a tile of integers, which Triton 3.9 refuses as a mask. Used
in a process of its own, with TRITON_INTERPRET=1.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_float(bits: np.ndarray) -> np.ndarray:
    """The numbers that bits of bfloat16 are."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bits(numbers: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, of the even one where two are as near."""
    exact = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = exact.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(exact), np.uint16(0x7FC0), rounded).reshape(np.shape(numbers))


def repair() -> None:
    """Make the interpreter of this process compute bfloat16 as a device does."""
    builder = interpreter.InterpreterBuilder
    cast, dot, splat = builder.cast_impl, builder.create_dot, builder.create_splat

    def repaired_cast(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, target)
        numbers = to_float(source.data) if before == tl.bfloat16 else np.asarray(source.data).astype(np.float32)
        data = to_bits(numbers) if after == tl.bfloat16 else numbers.astype(interpreter._get_np_dtype(after))
        return interpreter.TensorHandle(data, after)

    def repaired_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(to_float(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    def sliced_reduce(self: Any, operands: Any) -> Any:
        (operand,) = operands
        whole = operand.handle.data
        found, *rest = (self.to_tensor(s, operand.dtype) for s in np.split(whole, whole.shape[self.axis], self.axis))
        for one in rest:
            found = self.combine_fn.fn(found, one)
        return [found]

    def repaired_splat(self: Any, target: Any, source: Any) -> Any:
        handle = splat(self, target, source)
        truth = np.asarray(source.data).dtype == np.bool_  # a comparison of numbers says that it is one of them
        return interpreter.TensorHandle(handle.data.astype(np.bool_), tl.int1) if truth else handle

    patch = interpreter._patch_lang_tensor

    def repaired_patch(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    interpreter._patch_lang_tensor = repaired_patch
    interpreter.ReduceOps.generic_reduce = sliced_reduce
    builder.cast_impl, builder.create_dot, builder.create_splat = repaired_cast, repaired_dot, repaired_splat
    builder.create_fp_to_fp = lambda self, source, target, rounding: repaired_cast(self, source, target)
