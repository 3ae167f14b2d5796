"""The model of a run: two towers, normalisation on the device, and the adaptor."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.checkpoint import ADAPTOR, without_adaptor
from clip_retrieval.models.fast_layers import speed_up
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.lora import find_lora, merge_state
from clip_retrieval.models.model_config import ClipModule, State
from clip_retrieval.models.pooled import (
    BLOCK_FUNCTIONS,
    Positions,
    eos_id,
    pool_type,
    pooled_end_token,
    pooled_image_token,
    pools_one_image_token,
    pools_the_end_token,
)
from clip_retrieval.models.projection import (
    HUGGING_FACE,
    Projection,
    embedding_dim,
    project,
    text_part,
    text_projection,
    vision_projection,
    without_projection,
)

ADAPTOR_RATIO = 0.2
ADAPTOR_REDUCTION = 4


class RetrievalModel(nn.Module):
    """Encodes images and captions into one space.

    Args:
        clip: an open_clip CLIP or CustomTextCLIP, or a SimpleCLIP.
        preprocess: open_clip's preprocessing as a dict; mean and std are applied here, on the device.
        adaptor: add Clip_crossmodal_retrieval's adaptor behind the image tower.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: ClipModule, preprocess: dict, adaptor: bool = False):
        super().__init__()
        speed_up(clip)
        self.clip = clip
        self.preprocess = preprocess
        self.adaptor = make_adaptor(embedding_dim(clip)) if adaptor else None
        self.frozen: list[nn.Module] = []
        self.masks_padding = True
        self._functions = BLOCK_FUNCTIONS
        for name in ("mean", "std"):
            self.register_buffer(
                name, torch.tensor(preprocess[name], dtype=torch.float32).view(-1, 1, 1), persistent=False
            )

    def compile_towers(self) -> None:
        """Compile both towers (torch.compile): block by block if they are transformers, else as a whole.

        Names and weights do not change.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # a graph per text length
        self._functions = BLOCK_FUNCTIONS.compile()
        for tower in (self.clip.visual, text_part(self.clip).transformer):
            blocks = getattr(getattr(tower, "trunk", tower), "blocks", None) or getattr(tower, "resblocks", None)
            for module in blocks or [tower]:
                module.compile(dynamic=False)

    def forward(
        self, images: Tensor, texts: Tensor, lengths: Tensor | Positions | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode images and captions: two float32 tensors, (n, dim) and (m, dim), with L2-normalised rows.

        Args:
            images: uint8 (n, 3, height, width), or float (n, width) from `pooled_image`.
            texts: int64 (m, length), or float (m, width) from `pooled_text`.
            lengths: see `encode_text`.
        """
        image_features = self.project_image(images) if images.is_floating_point() else self.encode_image(images)
        text_features = self.project_text(texts) if texts.is_floating_point() else self.encode_text(texts, lengths)
        return image_features, text_features

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode uint8 images (n, 3, height, width) as float32 (n, dim), L2-normalised."""
        return self._adapt(self._run_vision(images))

    def encode_text(self, tokens: Tensor, lengths: Tensor | Positions | None = None) -> Tensor:
        """Encode int64 ids (n, length) as float32 (n, dim), L2-normalised. `length` may be below the context length.

        `lengths`, int64 (n,) on the CPU, is the number of ids of each row without padding; or the positions that follow
        from it. Towers that support it skip the padding (`packs_text`).
        """
        return F.normalize(self._run_text(tokens, lengths).float(), dim=-1)

    def pooled_image(self, images: Tensor) -> Tensor:
        """Encode uint8 images (n, 3, height, width) as float32 (n, width), before the projection."""
        with without_projection(vision_projection(self.clip)):
            return self._run_vision(images).float()

    def pooled_text(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode int64 ids (n, length) as float32 (n, width), before the projection."""
        with without_projection(text_projection(self.clip)):
            return self._run_text(tokens, lengths).float()

    def project_image(self, pooled: Tensor) -> Tensor:
        """Turn the output of `pooled_image` into the features of `encode_image`."""
        return self._adapt(project(vision_projection(self.clip), pooled.to(self._dtype)))

    def project_text(self, pooled: Tensor) -> Tensor:
        """Turn the output of `pooled_text` into the features of `encode_text`."""
        return F.normalize(project(text_projection(self.clip), pooled.to(self._dtype)).float(), dim=-1)

    def _run_vision(self, images: Tensor) -> Tensor:
        # The operations of ToTensor and Normalize, in their order: equal to the reference in every bit.
        pixels = images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
        memory_format = torch.channels_last if images.is_cuda else torch.preserve_format
        pixels, visual = pixels.to(self._dtype, memory_format=memory_format), self.clip.visual
        if pools_one_image_token(visual):
            return project(vision_projection(self.clip), pooled_image_token(visual, pixels, self._functions))
        return _drop_tokens(visual(pixels))

    def _adapt(self, features: Tensor) -> Tensor:
        features = F.normalize(features.float(), dim=-1)
        if self.adaptor is None:
            return features
        adapted = self.adaptor(features.to(self._dtype)).float()
        return F.normalize(ADAPTOR_RATIO * adapted + (1 - ADAPTOR_RATIO) * features, dim=-1)

    def _run_text(self, tokens: Tensor, lengths: Tensor | Positions | None) -> Tensor:
        text = text_part(self.clip)
        if lengths is not None and self.packs_text:
            return project(text_projection(self.clip), pooled_end_token(text, tokens, lengths, self._functions))
        if self.trims_text and not isinstance(text, HUGGING_FACE):
            return _encode_trimmed(text, tokens)
        return self.clip.encode_text(tokens) if text is self.clip else _drop_tokens(text(tokens))

    @property
    def packs_text(self) -> bool:
        """Whether the text tower skips the padding of captions with known lengths."""
        return pools_the_end_token(text_part(self.clip))

    @property
    def trims_text(self) -> bool:
        """Whether features stay the same if the padding that all captions of a batch share is cut.

        True if no token attends to the padding behind it: causal attention, and Hugging Face towers, which mask it
        (unless their pad id is not the tokenizer's: `masks_padding`).
        """
        text = text_part(self.clip)
        if isinstance(text, HUGGING_FACE):
            return self.masks_padding
        return (
            text.attn_mask is not None
            and getattr(text, "cls_emb", None) is None
            and pool_type(text) in ("argmax", "eos", "first")
        )

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.clip.visual.parameters()).dtype

    def train(self, mode: bool = True) -> RetrievalModel:
        """Set training mode, except for the modules in `frozen`: no dropout, no updates of batch statistics."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def copy_in(self, dtype: torch.dtype) -> RetrievalModel:
        """Return a copy that computes in `dtype`.

        Batch normalisation, logit scale and bias stay float32: both models share them. So do the weights of LoRA, whose
        sum is rounded.
        """
        shared = [self.mean, self.std, self.clip.logit_scale, self.clip.logit_bias]
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                shared += [module, *module.parameters(), *module.buffers()]
        for each in find_lora(self):
            shared += [each.weight, *each.low_rank.parameters()]
        known = {id(each): each for each in shared}
        model = copy.deepcopy(self, dict(known))
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and id(tensor) not in known:
                tensor.data = tensor.data.to(dtype)
        for each in find_lora(model):
            each.low_rank.dtype = dtype
        return model

    def weights(self) -> State:
        """Return the state dict of a checkpoint: open_clip's names, with LoRA merged, and `adaptor.*`."""
        state = merge_state(self.clip)
        if self.adaptor is not None:
            state.update({f"{ADAPTOR}{name}": value for name, value in self.adaptor.state_dict().items()})
        return state

    def load_weights(self, state: State, source: str = "best.pt") -> None:
        """Load a state dict from `weights`, strictly. Raises UserError, naming `source`, for another model's."""
        clip, adaptor = split_adaptor(state)
        with translate_errors(f"{source} holds the weights of another model"):
            self.clip.load_state_dict(clip)
            if self.adaptor is not None:
                self.adaptor.load_state_dict(adaptor)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works, which needs a C++ compiler and Python's headers; if not, log a warning."""
    effect = "only replays CUDA graphs" if device.type == "cuda" else "has no effect"
    remedy = "for more speed, install a C++ compiler (g++) and Python's headers"
    try:
        with translate_errors(f"--compile {effect}, torch.compile does not work here", remedy):
            torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(2, device=device))
    except UserError as error:
        log.warning(error)
        return False
    return True


def split_adaptor(state: State) -> tuple[State, State]:
    """Split a checkpoint's state dict into that of the CLIP and that of the adaptor."""
    adaptor = {name.removeprefix(ADAPTOR): v for name, v in state.items() if name.startswith(ADAPTOR)}
    return without_adaptor(state), adaptor


def make_adaptor(dim: int) -> nn.Sequential:
    """Make two bias-free layers, (n, dim) to (n, dim)."""
    hidden = dim // ADAPTOR_REDUCTION
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.ReLU())


def _drop_tokens(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return a tower's pooled output; CoCa's towers also return all tokens."""
    return output[0] if isinstance(output, tuple) else output


def _encode_trimmed(text: ClipModule, tokens: Tensor) -> Tensor:
    """Run open_clip's encode_text on ids shorter than the context length, which its own does not accept."""
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
    x = text_global_pool(x, tokens, pool_type(text), eos_token_id=eos_id(text))
    return project(Projection(text, "text_projection"), x)
