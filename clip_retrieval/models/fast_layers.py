"""Layers that compute the same as those of a CLIP model, with fewer copies and kernels.

`speed_up` changes the class of layers in place: names, weights and state dicts stay the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def speed_up(model: nn.Module) -> None:
    """Make patch embeddings matrix products, and self-attention free of copies. Features are equal up to rounding.

    Also switches off cuDNN's attention in this process: it spends milliseconds on a plan for each new caption length.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if type(module) is nn.Conv2d and _embeds_patches(module):
            module.__class__ = PatchEmbedding
        elif type(module) is nn.MultiheadAttention and module.in_proj_weight is not None and module.batch_first:
            module.__class__ = SelfAttention


def _embeds_patches(conv: nn.Conv2d) -> bool:
    return (
        conv.in_channels == 3
        and conv.stride == conv.kernel_size
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


class PatchEmbedding(nn.Conv2d):
    """A convolution of patches that do not overlap, as a matrix product."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed (n, 3, height, width) as (n, embedding width, rows, columns)."""
        (height, width), channels = self.kernel_size, self.in_channels
        rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
        pixels = pixels[:, :, : rows * height, : columns * width]
        # shape[0], not len(): that is a plain int, by which torch.export fixes the batch size
        patches = pixels.reshape(-1, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        embedded = F.linear(patches.reshape(pixels.shape[0], rows * columns, -1), self.weight.flatten(1), self.bias)
        # a view: open_clip and timm move the channels back to the end
        return embedded.transpose(1, 2).unflatten(2, (rows, columns))


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that does not copy queries, keys and values."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within (n, tokens, width). Everything else than plain self-attention is left to torch."""
        is_plain = query is key and key is value and key_padding_mask is None and not need_weights
        if not is_plain or (attn_mask is not None and not attn_mask.is_floating_point()):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if attn_mask is not None and attn_mask.ndim == 3:  # torch's shape of a mask for each item and head
            attn_mask = attn_mask.unflatten(0, (query.shape[0], self.num_heads))
        q, k, v = split_heads(F.linear(query, self.in_proj_weight, self.in_proj_bias), 3, self.num_heads)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        return self.out_proj(join_heads(attended)), None


def split_heads(projected: Tensor, number: int, heads: int) -> tuple[Tensor, ...]:
    """Split (n, tokens, number * width), e.g. queries, keys and values, into views (n, heads, tokens, head width)."""
    return projected.unflatten(2, (number, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(attended: Tensor) -> Tensor:
    """Join (n, heads, tokens, head width) to (n, tokens, width)."""
    return attended.transpose(1, 2).flatten(2)
