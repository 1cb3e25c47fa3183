"""Tensors of any bits, and whether two are the same to the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def random_bits(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every bit pattern there is: infinities, subnormals, negative zero and NaNs with their payload."""
    limits = torch.iinfo(BITS[dtype])
    return torch.randint(limits.min, limits.max, tuple(shape), generator=generator, dtype=BITS[dtype]).view(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Dtype, shape and bits: NaN is NaN here, and 0 is not -0."""
    return left.dtype == right.dtype and left.shape == right.shape and _bits(left).equal(_bits(right))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype])
