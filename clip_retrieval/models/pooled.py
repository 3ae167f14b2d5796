"""Transformer towers up to the one token they pool, without the work that it does not depend on.

open_clip computes every token of every block. But padding behind a caption changes nothing in front of it where
attention is causal, and of the last block only the pooled token is looked at. Here the tokens of all captions of a
batch stand one after the other, without padding, and the last block computes keys and values for all tokens but the
rest for one. The features are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def pools_one_image_token(visual: nn.Module) -> bool:
    """Whether `pooled_image_token` computes what this image tower pools: a ViT with a class token."""
    return (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
        and _has_plain_blocks(visual.transformer)
    )


def pools_the_end_token(text: nn.Module, pool_type: str) -> bool:
    """Whether `pooled_end_token` computes what this text tower pools: open_clip's causal one, at the end token."""
    return (
        getattr(text, "attn_mask", None) is not None
        and getattr(text, "cls_emb", None) is None
        and pool_type in ("argmax", "eos")
        and _has_plain_blocks(text.transformer)
    )


def _has_plain_blocks(transformer: nn.Module) -> bool:
    blocks = getattr(transformer, "resblocks", ())
    return transformer.batch_first and all(type(block) is ResidualAttentionBlock for block in blocks)


def pooled_image_token(visual: VisionTransformer, pixels: Tensor) -> Tensor:
    """(n, width): the class token of float (n, 3, height, width), before its projection."""
    x = visual._embeds(pixels)
    *blocks, last = visual.transformer.resblocks
    run = _runner(visual.transformer)
    for block in blocks:
        x = run(block, x)
    return visual.ln_post(run(_class_token, last, x))


def _class_token(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """A block's output (n, width) for the first token of x (n, tokens, width)."""
    normalized = block.ln_1(x)
    attended = block.attn(normalized[:, :1], normalized, normalized, need_weights=False)[0]
    return _feed_forward(block, x[:, 0] + block.ls_1(attended[:, 0]))


@dataclass(frozen=True)
class Packing:
    """Where the tokens of captions stand, one after the other (T = sum of the lengths) and padded (n, longest).

    Attributes:
        index: int64 (T,), place in the padded form, flattened.
        end: int64 (n,), place of each caption's last token among the T.
        mask: bool (n, 1, 1, longest), what is no padding.
    """

    index: Tensor
    end: Tensor
    mask: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> Packing:
        """Of captions of these lengths, int64 (n,) on the CPU: nothing waits for the device."""
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        index, end = mask.flatten().nonzero()[:, 0], lengths.cumsum(0) - 1
        parts = (index, end, mask[:, None, None])
        if device.type == "cuda":
            parts = tuple(part.pin_memory().to(device, non_blocking=True) for part in parts)
        return cls(*(part.to(device) for part in parts))

    def padded(self, x: Tensor, heads: int) -> Tensor:
        """(n, heads, longest, width / heads) of (T, width); zeros where there is no token."""
        n, longest = self.mask.shape[0], self.mask.shape[-1]
        padded = x.new_zeros(n * longest, x.shape[1]).index_copy(0, self.index, x)
        return padded.view(n, longest, heads, -1).transpose(1, 2)


def pooled_end_token(text: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
    """(n, width): the end token of captions, before its projection.

    Args:
        text: the module that holds the tower's parts.
        tokens: int64 (n, at least the longest length).
        lengths: int64 (n,), on the CPU: ids up to and including the end token.
    """
    pack = Packing.of(lengths, tokens.device)
    longest = pack.mask.shape[-1]
    ids = tokens[:, :longest].reshape(-1)[pack.index]
    dtype = text.transformer.get_cast_dtype()
    # F.embedding: the backward of positional_embedding[...] adds repeated rows with atomics, in any order.
    positions = F.embedding(pack.index % longest, text.positional_embedding)
    x = text.token_embedding(ids).to(dtype) + positions.to(dtype)
    *blocks, last = text.transformer.resblocks
    run = _runner(text.transformer)
    for block in blocks:
        x = run(_packed_block, block, x, pack)
    return text.ln_final(run(_end_token, last, x, pack))


def _packed_block(block: ResidualAttentionBlock, x: Tensor, pack: Packing) -> Tensor:
    """A block's output (T, width), attention causal within each caption."""
    attention, normalized = block.attn, block.ln_1(x)
    qkv = F.linear(normalized, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=1)
    q, k, v = (pack.padded(part, attention.num_heads) for part in qkv)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    attended = attended.transpose(1, 2).reshape(-1, x.shape[1]).index_select(0, pack.index)
    return _feed_forward(block, x + block.ls_1(attention.out_proj(attended)))


def _end_token(block: ResidualAttentionBlock, x: Tensor, pack: Packing) -> Tensor:
    """A block's output (n, width) for the last token of each caption."""
    attention, normalized, width = block.attn, block.ln_1(x), x.shape[1]
    of_query, of_rest = attention.in_proj_weight.split((width, 2 * width))
    bias_of_query, bias_of_rest = attention.in_proj_bias.split((width, 2 * width))
    k, v = (
        pack.padded(part, attention.num_heads) for part in F.linear(normalized, of_rest, bias_of_rest).chunk(2, dim=1)
    )
    q = F.linear(normalized.index_select(0, pack.end), of_query, bias_of_query).view(
        len(pack.end), attention.num_heads, 1, -1
    )
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=pack.mask).reshape(-1, width)
    return _feed_forward(block, x.index_select(0, pack.end) + block.ls_1(attention.out_proj(attended)))


def _feed_forward(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _runner(transformer: nn.Module) -> Callable[..., Tensor]:
    """Calls a block, keeping its activations or, with gradient checkpointing, computing them again."""
    if transformer.grad_checkpointing and torch.is_grad_enabled():
        return lambda function, *arguments: checkpoint(function, *arguments, use_reentrant=False)
    return lambda function, *arguments: function(*arguments)
