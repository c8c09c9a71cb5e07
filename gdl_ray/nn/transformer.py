"""A causal transformer that is trained on whole sequences and sampled token by token from a cache.

Blocks are pre-normalised and start as the identity. Position t sees positions 0 to t.

References:
    Vaswani et al. Attention Is All You Need. 2017. https://arxiv.org/abs/1706.03762
    Xiong et al. On Layer Normalization in the Transformer Architecture. 2020. https://arxiv.org/abs/2002.04745
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdl_ray.nn.dropout import dropout
from gdl_ray.nn.recompute import Block

# Positions. Attention over whole pieces has the same bits however many empty ones follow; but not in long
# sequences, which kernels add up in parts of lengths of their own: those are always read whole.
_PIECE, _LONG = 32, 256


class CausalTransformer(nn.Module):
    """Maps sequences to sequences, each position a function of itself and those before it.

    Args:
        width: of every position; a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        dropout: share of what each block adds that is dropped in training.
    """

    def __init__(self, width: int, depth: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.width, self.heads = width, heads
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor, key: Tensor | None = None, stream: int = 0) -> Tensor:
        """Map sequences of shape (B, T, width) to sequences of that shape.

        Args:
            h: the sequences.
            key: noise keys for dropout, int64 of shape (B,); None drops nothing.
            stream: first of the `2 * depth` noise streams that dropout uses.
        """
        for i, block in enumerate(self.blocks):
            h = block(h, key, stream + 2 * i)
        normed: Tensor = self.norm(h)
        return normed

    def empty_cache(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Make the cache of sequences of at least `length` positions: zeros, the batch dimension first."""
        # A head's keys lie one behind the other, the order in which attention reads them.
        whole = -(-length // _PIECE) * _PIECE
        shape = (len(self.blocks), 2, self.heads, whole, self.width // self.heads)
        return torch.zeros(batch, *shape, device=device)

    def step(self, h: Tensor, cache: Tensor, index: Tensor) -> Tensor:
        """Compute one position of each sequence as `forward` would, without gradient to the others.

        Args:
            h: the position's input, shape (B, width).
            cache: of the positions before it; this one is written into it.
            index: number of the position, int64 of shape (B,); each sequence has its own.

        Returns:
            The position's output, shape (B, width).
        """
        length = cache.shape[4]
        if index.device.type == "cpu":  # where it pays not to read what is empty, and asking needs no wait
            length = _whole(int(index.max()) + 1, length)
        seen = (torch.arange(length, device=index.device) <= index[:, None])[:, None, None]
        for i, block in enumerate(self.blocks):
            h = cast(_Block, block).step(h, cache[:, i], index, seen)
        normed: Tensor = self.norm(h)
        return normed


def _whole(count: int, length: int) -> int:
    """Tell how many positions are read for the first so many, in a sequence of a length in whole pieces."""
    return -(-count // _PIECE) * _PIECE if length <= _LONG else length


class _Block(Block):
    """Attention, then a network of two layers, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = _zero(nn.Linear(width, width))
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = _zero(nn.Linear(4 * width, width))

    def forward(self, h: Tensor, key: Tensor | None, stream: int) -> Tensor:
        B, T, width = h.shape
        qkv = self.qkv(self.norm_attention(h)).view(B, T, 3, self.heads, width // self.heads)
        # Not in bfloat16 on a CPU, where the gradient of that is slow.
        on_cpu = h.device.type == "cpu"
        with torch.autocast(h.device.type, enabled=False):
            q, k, v = (qkv.float() if on_cpu else qkv).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(B, T, width)
        h = h + dropout(self.out(attended), self.dropout, key, stream)
        return h + dropout(self._mlp(h), self.dropout, key, stream + 1)

    def step(self, h: Tensor, cache: Tensor, index: Tensor, seen: Tensor) -> Tensor:
        """Take one position, (B, width), with the cache of this block, (B, 2, heads, T, width / heads).

        `seen`, bool (B, 1, 1, S), tells which of the first S positions each sequence attends to.
        """
        B, width = h.shape
        q, k, v = self.qkv(self.norm_attention(h)).view(B, 3, self.heads, -1).unbind(1)
        rows = torch.arange(B, device=h.device)
        cache[rows, 0, :, index], cache[rows, 1, :, index] = k, v
        keys, values = cache[..., : seen.shape[-1], :].unbind(1)
        attended = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=seen)
        h = h + self.out(attended.reshape(B, width))
        return h + self._mlp(h)

    def _mlp(self, h: Tensor) -> Tensor:
        added: Tensor = self.down(F.silu(self.up(self.norm_mlp(h))))
        return added


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
