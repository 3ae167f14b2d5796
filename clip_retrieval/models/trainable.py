"""Select the trainable parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from clip_retrieval.errors import UserError
from clip_retrieval.models.model_config import ClipModule
from clip_retrieval.models.projection import Projection, text_projection, vision_projection
from clip_retrieval.models.towers import RetrievalModel


def set_trainable(
    model: RetrievalModel,
    trainable: str = "all",
    *,
    freeze_vision: bool = False,
    freeze_text: bool = False,
    learn_scale: bool = True,
    learn_bias: bool = False,
) -> None:
    """Make the chosen parameters of `model` trainable and freeze all others.

    Args:
        trainable: "all"; "linear_projection": the last projection of both towers; "adaptor": only the adaptor
            behind the image tower (both from Clip_crossmodal_retrieval). Logit scale and bias are trainable with each.
        freeze_vision: freeze the image tower.
        freeze_text: freeze the text tower.
        learn_scale: False for a loss without temperature: a parameter without a gradient would stop distributed
            training.
        learn_bias: True for a loss with a bias (SigLIP).

    A tower that is frozen except for its projection runs in evaluation mode and builds no graph.
    """
    vision, text = list(model.clip.visual.parameters()), list(text_parameters(model.clip))
    for parameter in model.parameters():
        parameter.requires_grad = False
    if trainable == "all":
        _set_requires_grad(vision, not freeze_vision)
        _set_requires_grad(text, not freeze_text)
    elif trainable == "linear_projection":
        if not freeze_vision:
            _set_requires_grad(_projection_parameters(vision_projection(model.clip), "image"), True)
        if not freeze_text:
            _set_requires_grad(_projection_parameters(text_projection(model.clip), "text"), True)
    if model.adaptor is not None:
        _set_requires_grad(model.adaptor.parameters(), True)
    _set_requires_grad([model.clip.logit_scale], learn_scale)
    if model.clip.logit_bias is not None:
        _set_requires_grad([model.clip.logit_bias], learn_bias)
    model.frozen = []
    if trainable != "all" or freeze_vision:
        model.frozen.append(model.clip.visual)
    if trainable != "all" or freeze_text:
        model.frozen.extend(text_modules(model.clip))


def vision_is_frozen(model: RetrievalModel) -> bool:
    """Whether the image tower is frozen, except perhaps for its projection."""
    return model.clip.visual in model.frozen


def text_is_frozen(model: RetrievalModel) -> bool:
    """Whether the text tower is frozen, except perhaps for its projection."""
    return text_modules(model.clip)[0] in model.frozen


def _set_requires_grad(parameters: Iterable[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad = value


def text_modules(clip: ClipModule) -> list[nn.Module]:
    """Return the modules of the text tower."""
    if hasattr(clip, "text"):
        return [clip.text]
    return [clip.transformer, clip.token_embedding, clip.ln_final]


def text_parameters(clip: ClipModule) -> Iterable[nn.Parameter]:
    """Return the parameters of the text tower."""
    # CoCa's caption decoder takes no part in retrieval.
    other = ("visual.", "logit_scale", "logit_bias", "text_decoder.")
    return [parameter for name, parameter in clip.named_parameters() if not name.startswith(other)]


def _projection_parameters(projection: Projection, tower: str) -> list[nn.Parameter]:
    parameters = projection.parameters()
    if not parameters:
        freeze = {"image": "--freeze_vision", "text": "--freeze_text"}[tower]
        raise UserError(
            f"--trainable linear_projection: this model's {tower} tower has no projection; add {freeze} to train only "
            "the other one, or use --trainable adaptor"
        )
    return parameters
