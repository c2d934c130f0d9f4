"""The dropout mask: a counter-based hash of (seed, position), in plain PyTorch.

Each element's 32 bits depend on the seed and on its flat index alone, so the backward makes the
mask again from the seed, whatever kernel made it in the forward. The hash is lowbias32 (Chris
Wellons, "Prospecting for hash functions", public domain), applied to the halves of the index with
a key for each, made from the halves of the seed by the same function.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def mix(h: Tensor) -> Tensor:
    """lowbias32, a bijection of 32 bits: each input bit flips each output bit about half the time.

    int64 arithmetic. The second constant is taken minus 2**32, which is the same modulo 2**32 and
    keeps the product of 32 bits by 32 within an int64.
    """
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK
    h = ((h ^ (h >> 15)) * (0x846CA68B - 2**32)) & MASK
    return h ^ (h >> 16)


def keep_mask(seed: Tensor, rows: int, width: int, p: float) -> Tensor:
    """A bool `[rows, width]`, False with probability p: the elements that dropout keeps.

    seed: an int64 tensor of one element; the mask is on its device. p is rounded to 24 bits.
    """
    first = mix(seed.reshape(()) & MASK)
    second = mix(((seed.reshape(()) >> 32) & MASK) ^ first)
    index = torch.arange(rows * width, device=seed.device)
    h = mix((index & MASK) ^ first)
    h = mix(h ^ (index >> 32) ^ second)
    return ((h & 0xFFFFFF) >= round(p * 2**24)).view(rows, width)
