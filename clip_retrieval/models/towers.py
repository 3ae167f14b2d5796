"""The model of a run: open_clip's two towers, and what a run needs around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import text_global_pool
from torch import nn

ADAPTOR_RATIO = 0.2
ADAPTOR_REDUCTION = 4


class RetrievalModel(nn.Module):
    """Encodes images and captions into one space.

    Args:
        clip: an open_clip CLIP or CustomTextCLIP.
        preprocess: open_clip's preprocessing as a dict; mean and std are applied here, on the device.
        adaptor: put a small adaptor behind the image tower (Clip_crossmodal_retrieval's).
    """

    def __init__(self, clip: nn.Module, preprocess: dict, adaptor: bool = False):
        super().__init__()
        self.clip = clip
        self.preprocess = preprocess
        self.adaptor = make_adaptor(embedding_dim(clip)) if adaptor else None
        self.frozen: list[nn.Module] = []
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocess[name]).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of images, uint8 (n, 3, height, width), and captions, int64 (m, length).

        Returns:
            Two float32 tensors, (n, dim) and (m, dim), of length-1 rows.
        """
        return self.encode_image(images), self.encode_text(tokens)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """float32 (n, dim), L2-normalised, of uint8 (n, 3, height, width)."""
        # As ToTensor and Normalize compute it, so that the values are the reference's to the last bit.
        pixels = images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
        features = F.normalize(self.clip.visual(pixels.to(self._dtype)).float(), dim=-1)
        if self.adaptor is None:
            return features
        adapted = self.adaptor(features.to(self._dtype)).float()
        return F.normalize(ADAPTOR_RATIO * adapted + (1 - ADAPTOR_RATIO) * features, dim=-1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 (n, dim), L2-normalised, of int64 (n, length). `length` may be shorter than the context."""
        text = text_part(self.clip)
        features = text(tokens) if isinstance(text, HFTextEncoder) else _encode_trimmed(text, tokens)
        return F.normalize(features.float(), dim=-1)

    @property
    def trims_text(self) -> bool:
        """Whether cutting the padding that all captions of a batch share leaves their features as they are.

        True where no token sees the padding behind it: causal attention, and masked Hugging Face towers.
        """
        text = text_part(self.clip)
        return isinstance(text, HFTextEncoder) or (
            text.attn_mask is not None
            and getattr(text, "cls_emb", None) is None
            and _pool_type(text) in ("argmax", "eos", "first")
        )

    @property
    def _dtype(self) -> torch.dtype:
        return self.clip.logit_scale.dtype

    def train(self, mode: bool = True) -> RetrievalModel:
        """Training mode, except for the parts in `frozen`: their batch statistics and dropout stay off."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict as a checkpoint holds it: open_clip's names, and `adaptor.*`."""
        state = self.clip.state_dict()
        if self.adaptor is not None:
            state.update({f"adaptor.{name}": value for name, value in self.adaptor.state_dict().items()})
        return state

    def load_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Load what `weights` gave, strictly."""
        adaptor = {name.removeprefix("adaptor."): v for name, v in state.items() if name.startswith("adaptor.")}
        self.clip.load_state_dict({name: v for name, v in state.items() if not name.startswith("adaptor.")})
        if self.adaptor is not None:
            self.adaptor.load_state_dict(adaptor)


def make_adaptor(dim: int) -> nn.Sequential:
    """Two bias-free layers, (n, dim) to (n, dim)."""
    hidden = dim // ADAPTOR_REDUCTION
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.ReLU())


def text_part(clip: nn.Module) -> nn.Module:
    """The module that holds the text tower's parts: open_clip's CLIP holds them itself, CustomTextCLIP as `text`."""
    return getattr(clip, "text", clip)


def embedding_dim(clip: nn.Module) -> int:
    """Width of the features."""
    text = text_part(clip)
    if isinstance(text, HFTextEncoder):
        return text.output_dim
    projection = text.text_projection
    if projection is None:
        return text.ln_final.weight.shape[0]
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


def _pool_type(text: nn.Module) -> str:
    return getattr(text, "text_pool_type", None) or text.pool_type


def _encode_trimmed(text: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """open_clip's encode_text for any number of tokens up to the context length: its own accepts only all of it."""
    length = tokens.shape[1]
    if getattr(text, "cls_emb", None) is not None or text.attn_mask is None:
        return text(tokens)
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
    eos = getattr(text, "text_eos_id", None) or getattr(text, "eos_id", None)
    x = text_global_pool(x, tokens, _pool_type(text), eos_token_id=eos)
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
