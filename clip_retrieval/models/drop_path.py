"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382): skip the branches of random blocks in training."""

from __future__ import annotations

from open_clip.transformer import ResidualAttentionBlock
from timm.layers import DropPath
from torch import Tensor, nn

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.model_config import ClipModule
from clip_retrieval.models.projection import text_part

TIMM = ("drop_path", "drop_path1", "drop_path2")  # attributes of timm's blocks, one for each branch


class DropPathBlock(ResidualAttentionBlock):
    """open_clip's block whose two branches are skipped at random in training, for each item by itself."""

    drop_path_rate: float

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Compute the block's output (n, tokens, width)."""
        x = q_x + self.drop(self.ls_1(self.attention(self.ln_1(q_x), k_x, v_x, attn_mask=attn_mask)))
        return x + self.drop(self.ls_2(self.mlp(self.ln_2(x))))

    def drop(self, branch: Tensor, rows: Tensor | None = None, items: int | None = None) -> Tensor:
        """Zero a branch for random items, and divide that of the others by their probability.

        Args:
            branch: (n, ...) for n items, or (T, ...) for packed ones.
            rows: int64 (T,), the item of each packed row, below `items`.
        """
        if not self.training:
            return branch
        factors = self.draw_factors(branch, branch.shape[0] if items is None else items)
        if rows is not None:
            factors = factors.index_select(0, rows)
        return branch * factors.view(-1, *[1] * (branch.ndim - 1))

    def draw_factors(self, like: Tensor, items: int) -> Tensor:
        """Draw 0 or 1 / (1 - rate) for each item, with dtype and device of `like`."""
        keep = 1 - self.drop_path_rate
        return like.new_empty(items).bernoulli_(keep).div_(keep)


def set_drop_path(clip: ClipModule, rate: float) -> None:
    """Set the rates of both towers, rising linearly with depth from 0 to `rate`.

    Names and weights stay the same. A tower without blocks that can be skipped gets a warning; UserError for two.
    """
    unsupported = []
    for tower, name in ((clip.visual, "image"), (text_part(clip).transformer, "text")):
        blocks = [module for module in tower.modules() if type(module) is ResidualAttentionBlock]
        timm_blocks = [module for module in tower.modules() if any(_can_drop(module, attribute) for attribute in TIMM)]
        for number, block in enumerate(blocks or timm_blocks):
            own = rate * number / max(1, len(blocks or timm_blocks) - 1)
            if type(block) is ResidualAttentionBlock and own:
                block.__class__ = DropPathBlock
                block.drop_path_rate = own
            for attribute in TIMM:
                if _can_drop(block, attribute):
                    setattr(block, attribute, DropPath(own).train(block.training))
        if not blocks and not timm_blocks:
            unsupported.append(f"{name} tower ({type(getattr(tower, 'trunk', tower)).__name__})")
    if len(unsupported) == 2:
        raise UserError(f"--drop_path: not for this model's {' and '.join(unsupported)}; drop it")
    if unsupported:
        log.warning(f"--drop_path has no effect on this model's {unsupported[0]}")


def _can_drop(block: nn.Module, attribute: str) -> bool:
    return isinstance(getattr(block, attribute, None), (nn.Identity, DropPath))
