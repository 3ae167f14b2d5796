"""The pooled token of a transformer tower, without the work that it does not depend on.

open_clip computes every token in every block. But with causal attention, padding behind a caption does not affect it,
and only the pooled token of the last block is used. Here the captions of a batch are packed one after the other,
without padding; the last block computes keys and values for all tokens, everything else for one. The features are
equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clip_retrieval.models.drop_path import DropPathBlock
from clip_retrieval.models.fast_layers import join_heads, split_heads
from clip_retrieval.models.model_config import ClipModule

PLAIN = (ResidualAttentionBlock, DropPathBlock)


def pools_one_image_token(visual: ClipModule) -> bool:
    """Whether `pooled_image_token` works for this image tower: a ViT that pools its class token."""
    return (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
        and _has_plain_blocks(visual.transformer)
    )


def pools_the_end_token(text: ClipModule) -> bool:
    """Whether `pooled_end_token` works for this text tower: open_clip's causal one that pools its end token."""
    return (
        getattr(text, "attn_mask", None) is not None
        and getattr(text, "cls_emb", None) is None
        and pool_type(text) in ("argmax", "eos")
        and _has_plain_blocks(text.transformer)
    )


def _has_plain_blocks(transformer: ClipModule) -> bool:
    blocks = getattr(transformer, "resblocks", ())
    return getattr(transformer, "batch_first", True) and all(type(block) in PLAIN for block in blocks)


@dataclass(frozen=True)
class BlockFunctions:
    """The functions that compute the blocks, compiled or not. Blocks of one shape share their compiled code."""

    block: Callable[..., Tensor]
    class_token: Callable[..., Tensor]
    packed_block: Callable[..., Tensor]
    end_token: Callable[..., Tensor]

    def compile(self) -> BlockFunctions:
        """Compile them: for images of one size, and for captions of any lengths."""
        return BlockFunctions(
            torch.compile(self.block, dynamic=False),
            torch.compile(self.class_token, dynamic=False),
            torch.compile(self.packed_block, dynamic=True),
            torch.compile(self.end_token, dynamic=True),
        )


def pooled_image_token(visual: VisionTransformer, pixels: Tensor, functions: BlockFunctions) -> Tensor:
    """Compute the class token (n, width), before the projection, of float images (n, 3, height, width)."""
    x = visual._embeds(pixels)
    *blocks, last = visual.transformer.resblocks
    run = _runner(visual.transformer)
    for block in blocks:
        x = run(functions.block, block, x)
    return visual.ln_post(run(functions.class_token, last, x))


def _block(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """Compute a block's output for all tokens: (n, tokens, width)."""
    return block(x)


def _class_token(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """Compute a block's output (n, width) for the first token of x (n, tokens, width)."""
    normalized = block.ln_1(x)
    kv = F.linear(normalized, *_key_value_projection(block))
    return _attend_from(block, x[:, 0], normalized[:, 0], kv)


@dataclass(frozen=True)
class Positions:
    """Positions of the tokens of captions: packed one after the other (T = sum of the lengths), or padded (n, longest).

    Attributes:
        index: int64 (T,), position of each packed token in the flattened padded form.
        starts: int64 (n,), packed position of each caption's first token.
        longest: tokens of a row in the padded form.
    """

    index: Tensor
    starts: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device, longest: int | None = None) -> Positions:
        """Compute them on the CPU and move them to the device, which nothing waits for.

        Args:
            lengths: int64 (n,) on the CPU.
            longest: at least the longest length, which is the default.
        """
        longest = int(lengths.max()) if longest is None else longest
        index = (torch.arange(longest) < lengths[:, None]).flatten().nonzero()[:, 0]
        starts = lengths.cumsum(0) - lengths
        if device.type == "cuda":
            index, starts = index.pin_memory(), starts.pin_memory()
        return cls(index.to(device, non_blocking=True), starts.to(device, non_blocking=True), longest)


@dataclass(frozen=True)
class Packing:
    """Packed captions and the token that is pooled of each.

    Attributes:
        index: int64 (T,), see `Positions`.
        end: int64 (n,), packed position of each caption's pooled token.
        mask: bool (n, 1, 1, longest), True for the tokens up to the pooled one.
    """

    index: Tensor
    end: Tensor
    mask: Tensor

    @classmethod
    def of(cls, positions: Positions, pooled: Tensor) -> Packing:
        """Pack captions; pooled: int64 (n,), position of the pooled token in each caption."""
        columns = torch.arange(positions.longest, device=pooled.device)
        return cls(positions.index, positions.starts + pooled, (columns <= pooled[:, None])[:, None, None])

    def pad(self, x: Tensor) -> Tensor:
        """Pad (T, width) with zeros to (n, longest, width)."""
        n, longest = self.mask.shape[0], self.mask.shape[-1]
        return x.new_zeros(n * longest, x.shape[1]).index_copy(0, self.index, x).view(n, longest, -1)


def pooled_end_token(
    text: ClipModule, tokens: Tensor, lengths: Tensor | Positions, functions: BlockFunctions
) -> Tensor:
    """Compute the end token (n, width) of captions, before the projection.

    Args:
        text: the module that holds the tower's parts.
        tokens: int64 (n, length), at least as long as the longest caption.
        lengths: int64 (n,) on the CPU: number of ids without padding; or the positions that follow from them.
        functions: those that compute the blocks.
    """
    positions = Positions.of(lengths, tokens.device) if isinstance(lengths, Tensor) else lengths
    longest = positions.longest
    pack = Packing.of(positions, _find_end_token(text, tokens[:, :longest]))
    ids = tokens[:, :longest].reshape(-1)[pack.index]
    dtype = text.transformer.get_cast_dtype()
    # F.embedding is deterministic; the backward of positional_embedding[...] adds repeated rows with atomics.
    embedded = F.embedding(pack.index % longest, text.positional_embedding)
    x = text.token_embedding(ids).to(dtype) + embedded.to(dtype)
    *blocks, last = text.transformer.resblocks
    run = _runner(text.transformer)
    for block in blocks:
        x = run(functions.packed_block, block, x, pack)
    return text.ln_final(run(functions.end_token, last, x, pack))


def _find_end_token(text: ClipModule, tokens: Tensor) -> Tensor:
    """Find the token that open_clip pools, int64 (n,): the first end token, also if a caption spells it."""
    if pool_type(text) == "eos":
        tokens = (tokens == eos_id(text)).int()
    return tokens.argmax(dim=-1)


def pool_type(text: ClipModule) -> str:
    """Return the name of a text tower's pooling, empty for Hugging Face towers."""
    return getattr(text, "text_pool_type", "") or getattr(text, "pool_type", "")


def eos_id(text: ClipModule) -> int:
    """Return the id of the token that `eos` pooling pools; 0 if there is none."""
    return getattr(text, "text_eos_id", 0) or getattr(text, "eos_id", 0)


def _packed_block(block: ResidualAttentionBlock, x: Tensor, pack: Packing) -> Tensor:
    """Compute a block's output (T, width), with causal attention within each caption."""
    attention = block.attn
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = split_heads(pack.pad(qkv), 3, attention.num_heads)
    attended = join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))
    attended = attended.flatten(0, 1).index_select(0, pack.index)
    return _feed_forward(block, _add(block, x, block.ls_1(attention.out_proj(attended)), pack), pack)


def _end_token(block: ResidualAttentionBlock, x: Tensor, pack: Packing) -> Tensor:
    """Compute a block's output (n, width) for the pooled token of each caption."""
    normalized = block.ln_1(x)
    kv = pack.pad(F.linear(normalized, *_key_value_projection(block)))
    return _attend_from(block, x.index_select(0, pack.end), normalized.index_select(0, pack.end), kv, pack.mask)


def _key_value_projection(block: ResidualAttentionBlock) -> tuple[Tensor, Tensor]:
    """Return the weight (2 width, width) and the bias (2 width,) of keys and values."""
    width = block.attn.out_proj.in_features
    return block.attn.in_proj_weight[width:], block.attn.in_proj_bias[width:]


def _attend_from(
    block: ResidualAttentionBlock, x: Tensor, normalized: Tensor, kv: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Compute a block's output (n, width) for one token of each item.

    Args:
        x, normalized: (n, width), the token before and after the first norm.
        kv: (n, tokens, 2 width), keys and values of all tokens.
        mask: bool (n, 1, 1, tokens), False for tokens to leave out.
    """
    attention, width = block.attn, x.shape[1]
    q = F.linear(normalized, attention.in_proj_weight[:width], attention.in_proj_bias[:width])
    k, v = split_heads(kv, 2, attention.num_heads)
    q = q.unflatten(1, (attention.num_heads, 1, -1))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1)
    return _feed_forward(block, _add(block, x, block.ls_1(attention.out_proj(attended))))


def _feed_forward(block: ResidualAttentionBlock, x: Tensor, pack: Packing | None = None) -> Tensor:
    return _add(block, x, block.ls_2(block.mlp(block.ln_2(x))), pack)


def _add(block: ResidualAttentionBlock, x: Tensor, branch: Tensor, pack: Packing | None = None) -> Tensor:
    """Add a branch to x: (n, width), or (T, width) for packed captions; --drop_path skips it for some of the items."""
    if not isinstance(block, DropPathBlock):
        return x + branch
    if pack is None:
        return x + block.drop(branch)
    items, longest = pack.mask.shape[0], pack.mask.shape[-1]
    return x + block.drop(branch, pack.index // longest, items)


def _runner(transformer: ClipModule) -> Callable[..., Tensor]:
    """Return a function that runs a block, with gradient checkpointing if the transformer has it enabled."""
    if transformer.grad_checkpointing and torch.is_grad_enabled():
        return lambda function, *arguments: checkpoint(function, *arguments, use_reentrant=False)
    return lambda function, *arguments: function(*arguments)


BLOCK_FUNCTIONS = BlockFunctions(_block, _class_token, _packed_block, _end_token)
