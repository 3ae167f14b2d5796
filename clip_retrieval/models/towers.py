"""The model of a run: open_clip's two towers, and what a run needs around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from clip_retrieval.errors import UserError, describe
from clip_retrieval.models.pooled import (
    pooled_end_token,
    pooled_image_token,
    pools_one_image_token,
    pools_the_end_token,
)
from clip_retrieval.models.simple_clip_model import DistilBertTower, TorchvisionTower

HUGGING_FACE = (HFTextEncoder, DistilBertTower)
"""Text towers of transformers: masked, and projected by a module `proj`."""

ADAPTOR_RATIO = 0.2
ADAPTOR_REDUCTION = 4


class RetrievalModel(nn.Module):
    """Encodes images and captions into one space.

    Args:
        clip: an open_clip CLIP or CustomTextCLIP, or a SimpleCLIP.
        preprocess: open_clip's preprocessing as a dict; mean and std are applied here, on the device.
        adaptor: put a small adaptor behind the image tower (Clip_crossmodal_retrieval's).
    """

    def __init__(self, clip: nn.Module, preprocess: dict, adaptor: bool = False):
        super().__init__()
        self.clip = clip
        self.preprocess = preprocess
        self.adaptor = make_adaptor(embedding_dim(clip)) if adaptor else None
        self.frozen: list[nn.Module] = []
        self._pooled_image_token = pooled_image_token
        for name in ("mean", "std"):
            self.register_buffer(
                name, torch.tensor(preprocess[name], dtype=torch.float32).view(-1, 1, 1), persistent=False
            )

    def compile_towers(self) -> None:
        """Compile both towers where they are called (torch.compile); names and weights stay as they are."""
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # a graph per text length
        self._pooled_image_token = torch.compile(pooled_image_token, dynamic=False)
        self.clip.visual.compile(dynamic=False)
        text_part(self.clip).transformer.compile(dynamic=False)

    def forward(self, images: Tensor, texts: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of images and captions: two float32 tensors, (n, dim) and (m, dim), of length-1 rows.

        Args:
            images: uint8 (n, 3, height, width), or float (n, width) that `pooled_image` gave for them.
            texts: int64 (m, length), or float (m, width) that `pooled_text` gave for them.
            lengths: see `encode_text`.
        """
        image_features = self.project_image(images) if images.is_floating_point() else self.encode_image(images)
        text_features = self.project_text(texts) if texts.is_floating_point() else self.encode_text(texts, lengths)
        return image_features, text_features

    def encode_image(self, images: Tensor) -> Tensor:
        """float32 (n, dim), L2-normalised, of uint8 (n, 3, height, width)."""
        return self._adapted(self._visual(images))

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """float32 (n, dim), L2-normalised, of int64 (n, length). `length` may be shorter than the context.

        `lengths`, int64 (n,) on the CPU, says how many ids of a row are no padding; where the tower allows it, the rest
        costs nothing.
        """
        return F.normalize(self._text(tokens, lengths).float(), dim=-1)

    def pooled_image(self, images: Tensor) -> Tensor:
        """float32 (n, width) of uint8 (n, 3, height, width): what the image tower gives before its projection."""
        with without_projection(vision_projection(self.clip)):
            return self._visual(images).float()

    def pooled_text(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """float32 (n, width) of int64 (n, length): what the text tower gives before its projection."""
        with without_projection(text_projection(self.clip)):
            return self._text(tokens, lengths).float()

    def project_image(self, pooled: Tensor) -> Tensor:
        """The same features as `encode_image`, from what `pooled_image` gave."""
        return self._adapted(_project(vision_projection(self.clip), pooled))

    def project_text(self, pooled: Tensor) -> Tensor:
        """The same features as `encode_text`, from what `pooled_text` gave."""
        return F.normalize(_project(text_projection(self.clip), pooled).float(), dim=-1)

    def _visual(self, images: Tensor) -> Tensor:
        # As ToTensor and Normalize compute it, so that the values are the reference's to the last bit.
        pixels = images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
        if images.is_cuda:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        pixels, visual = pixels.to(self._dtype), self.clip.visual
        if pools_one_image_token(visual):
            return _project(vision_projection(self.clip), self._pooled_image_token(visual, pixels))
        return _without_tokens(visual(pixels))

    def _adapted(self, features: Tensor) -> Tensor:
        features = F.normalize(features.float(), dim=-1)
        if self.adaptor is None:
            return features
        adapted = self.adaptor(features.to(self._dtype)).float()
        return F.normalize(ADAPTOR_RATIO * adapted + (1 - ADAPTOR_RATIO) * features, dim=-1)

    def _text(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        text = text_part(self.clip)
        if lengths is not None and pools_the_end_token(text, _pool_type(text)):
            return _project(text_projection(self.clip), pooled_end_token(text, tokens, lengths))
        if self.trims_text and not isinstance(text, HUGGING_FACE):
            return _encode_trimmed(text, tokens)
        return self.clip.encode_text(tokens) if text is self.clip else _without_tokens(text(tokens))

    @property
    def trims_text(self) -> bool:
        """Whether cutting the padding that all captions of a batch share leaves their features as they are.

        True where no token sees the padding behind it: causal attention, and masked Hugging Face towers.
        """
        text = text_part(self.clip)
        return isinstance(text, HUGGING_FACE) or (
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

    def weights(self) -> dict[str, Tensor]:
        """The state dict as a checkpoint holds it: open_clip's names, and `adaptor.*`."""
        state = self.clip.state_dict()
        if self.adaptor is not None:
            state.update({f"adaptor.{name}": value for name, value in self.adaptor.state_dict().items()})
        return state

    def load_weights(self, state: dict[str, Tensor], source: str = "best.pt") -> None:
        """Load what `weights` gave, strictly. Raises UserError, naming `source`, for weights of another model."""
        adaptor = {name.removeprefix("adaptor."): v for name, v in state.items() if name.startswith("adaptor.")}
        try:
            self.clip.load_state_dict({name: v for name, v in state.items() if not name.startswith("adaptor.")})
            if self.adaptor is not None:
                self.adaptor.load_state_dict(adaptor)
        except RuntimeError as error:
            raise UserError(f"{source} holds the weights of another model ({describe(error)})") from error


def check_compiles(device: torch.device) -> None:
    """Raise UserError if torch.compile does not work here: it needs a compiler, and headers beside it."""
    try:
        torch.compile(_tiny, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:  # of torch's, the compiler's or Triton's
        raise UserError(
            f"--compile: torch.compile does not work here ({describe(error)}); install a C++ compiler (g++) and "
            "Python's headers, or leave --compile out"
        ) from error


def _tiny(x: Tensor) -> Tensor:
    return x.sin() + 1


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
    if isinstance(text, HUGGING_FACE):
        return text.output_dim
    projection = text.text_projection
    if projection is None:
        return text.ln_final.weight.shape[0]
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


@dataclass(frozen=True)
class Projection:
    """Where a tower holds its projection into the shared space: a parameter, a module, or nothing."""

    owner: nn.Module
    name: str

    @property
    def value(self) -> nn.Module | nn.Parameter | None:
        return getattr(self.owner, self.name, None)

    def parameters(self) -> list[nn.Parameter]:
        if isinstance(self.value, nn.Module):
            return list(self.value.parameters())
        return [] if self.value is None else [self.value]


def vision_projection(clip: nn.Module) -> Projection:
    """ViT's `proj`, a ResNet's `attnpool.c_proj`, the head of a tower of timm or torchvision."""
    visual = clip.visual
    if isinstance(visual, (TimmModel, TorchvisionTower)):
        return Projection(visual, "head")
    if hasattr(visual, "attnpool"):
        return Projection(visual.attnpool, "c_proj")
    return Projection(visual, "proj")


def text_projection(clip: nn.Module) -> Projection:
    """`text_projection`, or a Hugging Face tower's `proj`."""
    text = text_part(clip)
    return Projection(text, "proj" if isinstance(text, HUGGING_FACE) else "text_projection")


@contextmanager
def without_projection(projection: Projection) -> Iterator[None]:
    """A block in which the tower gives what it would project."""
    value = projection.value
    if value is None:
        yield
        return
    replacement: nn.Module | None = None
    if projection.name == "c_proj":  # the attention in front of it reads its weights and bias, and needs some
        replacement = nn.Linear(value.in_features, value.in_features).to(value.weight)
        nn.init.eye_(replacement.weight)
        nn.init.zeros_(replacement.bias)
    elif projection.name != "text_projection" and isinstance(value, nn.Module):
        replacement = nn.Identity()
    setattr(projection.owner, projection.name, replacement)
    try:
        yield
    finally:
        setattr(projection.owner, projection.name, value)


def _project(projection: Projection, pooled: Tensor) -> Tensor:
    value = projection.value
    if value is None:
        return pooled
    return value(pooled) if isinstance(value, nn.Module) else pooled @ value


def _pool_type(text: nn.Module) -> str:
    return getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "")


def _without_tokens(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """A tower's output; CoCa's give the features of all tokens as well."""
    return output[0] if isinstance(output, tuple) else output


def _encode_trimmed(text: nn.Module, tokens: Tensor) -> Tensor:
    """open_clip's encode_text for any number of tokens up to the context length: its own accepts only all of it."""
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
    eos = getattr(text, "text_eos_id", None) or getattr(text, "eos_id", None)
    x = text_global_pool(x, tokens, _pool_type(text), eos_token_id=eos)
    return _project(Projection(text, "text_projection"), x)
