"""Counter-based noise: every draw is a pure function of (key, stream, index), the same on every device.

A sample that owns its key does not care which batch, worker or replica draws it, and a resumed training step
needs no generator state: its noise is recomputed from its number.

The bits are Threefry-2x32 with 13 rounds, the fewest that pass BigCrush: the key is the 64-bit key, the
counter is (index // 2, stream).

References:
    Salmon, Moraes, Dror, Shaw. Parallel random numbers: as easy as 1, 2, 3. SC 2011.
    https://doi.org/10.1145/2063384.2063405
"""

import math

import torch
from torch import Tensor

_ROUNDS = 13
_PARITY = 0x1BD11BDA
# (left shift, right shift, mask) of each rotation; tensors cost an operation half of what Python ints do.
_ROTATIONS = tuple(
    (bits, torch.tensor(32 - bits, dtype=torch.int32), torch.tensor((1 << bits) - 1, dtype=torch.int32))
    for bits in (13, 15, 26, 6, 17, 29, 16, 24)
)


def threefry(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor]:
    """Encrypt counter words with key words: Threefry-2x32-13.

    Args:
        k0: first key word, int32.
        k1: second key word, int32, same shape.
        c0: first counter word, int32, broadcasts with the key to the shape of the result.
        c1: second counter word, int32, broadcasts to the shape of the result.

    Returns:
        Two int32 tensors, each bit uniform.
    """
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0 = c0 + k0
    x1 = (c1 + k1).expand_as(x0).contiguous()
    high = torch.empty_like(x1)
    for i in range(_ROUNDS):
        bits, complement, mask = _ROTATIONS[i % 8]
        x0.add_(x1)
        # x1 = rotate_left(x1, bits) ^ x0. The shift of an int32 keeps the sign, hence the mask;
        # adding x1 * 2**bits is the left half of the rotation in the same pass.
        torch.bitwise_right_shift(x1, complement, out=high)
        high.bitwise_and_(mask).add_(x1, alpha=1 << bits)
        torch.bitwise_xor(high, x0, out=x1)
        if i % 4 == 3:
            inject = i // 4 + 1
            x0.add_(schedule[inject % 3])
            x1.add_(schedule[(inject + 1) % 3] + inject)
    return x0, x1


def _words(value: Tensor) -> tuple[Tensor, Tensor]:
    return (value >> 32).to(torch.int32), value.to(torch.int32)


def fold(key: Tensor | int, index: Tensor | int, purpose: int = 0) -> Tensor:
    """Derive keys, independent of each other, of `key` and of its noise.

    Args:
        key: int64 keys, or one as an int below 2**63.
        index: int64 or int in [0, 2**31), broadcast against the keys.
        purpose: what the new keys are for, in [0, 2**31); others for another purpose.

    Returns:
        int64 keys of the broadcast shape, on the device of the arguments.
    """
    device = next((given.device for given in (key, index) if isinstance(given, Tensor)), None)
    key = torch.as_tensor(key, dtype=torch.int64, device=device)
    count = torch.as_tensor(index, dtype=torch.int32, device=device)
    # Noise streams count up from 0 in the second word, so derived keys count down from -1.
    below = torch.full_like(count, -1 - purpose)
    high, low = threefry(*_words(key), count, below)
    return (high.to(torch.int64) << 32) | (low.to(torch.int64) & 0xFFFFFFFF)


def _blocks(key: Tensor, count: int, stream: Tensor | int) -> tuple[Tensor, Tensor]:
    """Random words for `count` draws a key: two int32 tensors, shape (B, ceil(count / 2))."""
    high, low = _words(key[:, None])
    index = torch.arange((count + 1) // 2, dtype=torch.int32, device=key.device)
    number = torch.as_tensor(stream, dtype=torch.int32, device=key.device).reshape(-1, 1)
    return threefry(high, low, index, number)


def _unit(words: Tensor) -> Tensor:
    """Map int32 words to float32 on the centres of 2**23 bins of (0, 1), exactly; overwrites `words`."""
    return (words.bitwise_right_shift_(9) * 2.0**-23).add_(0.5 + 2.0**-24)


def _interleave(first: Tensor, second: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Lay the two draws of each block side by side: float32 (B, *shape)."""
    pairs = torch.view_as_real(torch.complex(first, second)).flatten(1)  # the fastest of many ways
    return pairs[:, : math.prod(shape)].reshape(len(first), *shape)


def uniform(key: Tensor, shape: tuple[int, ...], stream: Tensor | int = 0) -> Tensor:
    """Draw uniforms, one independent sequence per key.

    Args:
        key: int64 keys, shape (B,).
        shape: shape of one draw.
        stream: what the draw is for, in [0, 2**31); an int, or int64 of shape (B,), one per key.

    Returns:
        float32 of shape (B, *shape), in the open interval (0, 1).
    """
    first, second = _blocks(key, math.prod(shape), stream)
    return _interleave(_unit(first), _unit(second), shape)


def normal(key: Tensor, shape: tuple[int, ...], stream: Tensor | int = 0) -> Tensor:
    """Draw standard normals by the Box-Muller transform; arguments as in `uniform`.

    Returns:
        float32 of shape (B, *shape), in about (-5.8, 5.8).
    """
    first, second = _blocks(key, math.prod(shape), stream)
    angle = second * (math.pi * 2.0**-31)
    radius = _unit(first).log_().mul_(-2).sqrt_()
    return _interleave(angle.cos().mul_(radius), angle.sin_().mul_(radius), shape)
