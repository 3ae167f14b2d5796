"""Which parameters learn."""

from __future__ import annotations

from collections.abc import Iterable

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import nn

from clip_retrieval.errors import UserError
from clip_retrieval.models.towers import RetrievalModel, text_part


def set_trainable(
    model: RetrievalModel,
    trainable: str = "all",
    *,
    freeze_vision: bool = False,
    freeze_text: bool = False,
    learn_scale: bool = True,
    learn_bias: bool = False,
) -> None:
    """Let the chosen parameters of `model` learn, and no others.

    Args:
        trainable: "all"; "linear_projection": the last projection of both towers; "adaptor": only the adaptor
            behind the image tower (both from Clip_crossmodal_retrieval). The logit scale and bias learn with each.
        freeze_vision: the image tower does not learn.
        freeze_text: the text tower does not learn.
        learn_scale: False for a loss that has no temperature: a parameter without a gradient would stop
            distributed training.
        learn_bias: True for a loss that has a bias (SigLIP).

    A tower of which at most the projection learns runs in evaluation mode and builds no graph.
    """
    vision, text = list(model.clip.visual.parameters()), list(text_parameters(model.clip))
    for parameter in model.parameters():
        parameter.requires_grad = False
    if trainable == "all":
        _learn(vision, not freeze_vision)
        _learn(text, not freeze_text)
    elif trainable == "linear_projection":
        _learn(vision_projection(model.clip.visual), not freeze_vision)
        _learn(text_projection(model.clip), not freeze_text)
    if model.adaptor is not None:
        _learn(model.adaptor.parameters(), True)
    _learn([model.clip.logit_scale], learn_scale)
    if model.clip.logit_bias is not None:
        _learn([model.clip.logit_bias], learn_bias)
    model.frozen = []
    if trainable != "all" or freeze_vision:
        model.frozen.append(model.clip.visual)
    if trainable != "all" or freeze_text:
        model.frozen.extend(text_modules(model.clip))


def _learn(parameters: Iterable[nn.Parameter], learn: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad = learn


def text_modules(clip: nn.Module) -> list[nn.Module]:
    """The modules of the text tower."""
    if hasattr(clip, "text"):
        return [clip.text]
    return [clip.transformer, clip.token_embedding, clip.ln_final]


def text_parameters(clip: nn.Module) -> Iterable[nn.Parameter]:
    """Every parameter that is neither the image tower's nor the scale or bias."""
    other = ("visual.", "logit_scale", "logit_bias")
    return [parameter for name, parameter in clip.named_parameters() if not name.startswith(other)]


def vision_projection(visual: nn.Module) -> list[nn.Parameter]:
    """The projection into the shared space: ViT's `proj`, a ResNet's `attnpool.c_proj`, a timm tower's head."""
    if getattr(visual, "proj", None) is not None:
        return [visual.proj]
    if isinstance(visual, TimmModel):
        parameters = list(visual.head.parameters())
    elif hasattr(visual, "attnpool"):
        parameters = list(visual.attnpool.c_proj.parameters())
    else:
        parameters = []
    return _some(parameters, "image")


def text_projection(clip: nn.Module) -> list[nn.Parameter]:
    """The projection into the shared space of the text tower."""
    text = text_part(clip)
    projection = text.proj if isinstance(text, HFTextEncoder) else text.text_projection
    if isinstance(projection, nn.Parameter):
        return [projection]
    return _some(list(projection.parameters()) if projection is not None else [], "text")


def _some(parameters: list[nn.Parameter], tower: str) -> list[nn.Parameter]:
    if not parameters:
        raise UserError(
            f"--trainable linear_projection: this model's {tower} tower has no projection; use --trainable adaptor"
        )
    return parameters
