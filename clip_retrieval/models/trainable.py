"""Which parameters learn."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from clip_retrieval.errors import UserError
from clip_retrieval.models.towers import Projection, RetrievalModel, text_projection, vision_projection


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
        _learn(_of(vision_projection(model.clip), "image"), not freeze_vision)
        _learn(_of(text_projection(model.clip), "text"), not freeze_text)
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


def vision_is_frozen(model: RetrievalModel) -> bool:
    """Whether no more than the projection of the image tower learns."""
    return any(module is model.clip.visual for module in model.frozen)


def text_is_frozen(model: RetrievalModel) -> bool:
    """Whether no more than the projection of the text tower learns."""
    return any(module is text_modules(model.clip)[0] for module in model.frozen)


def _learn(parameters: Iterable[nn.Parameter], learn: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad = learn


def text_modules(clip: nn.Module) -> list[nn.Module]:
    """The modules of the text tower."""
    if hasattr(clip, "text"):
        return [clip.text]
    return [clip.transformer, clip.token_embedding, clip.ln_final]


def text_parameters(clip: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of the text tower."""
    # (CoCa's caption decoder takes no part in retrieval.)
    other = ("visual.", "logit_scale", "logit_bias", "text_decoder.")
    return [parameter for name, parameter in clip.named_parameters() if not name.startswith(other)]


def _of(projection: Projection, tower: str) -> list[nn.Parameter]:
    parameters = projection.parameters()
    if not parameters:
        raise UserError(
            f"--trainable linear_projection: this model's {tower} tower has no projection; use --trainable adaptor"
        )
    return parameters
