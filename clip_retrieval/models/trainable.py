"""Select the trainable parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from clip_retrieval.errors import UserError
from clip_retrieval.models.layers import frozen_layers, place_parameters
from clip_retrieval.models.lora import LoraSettings, add_lora, find_linear
from clip_retrieval.models.model_config import ClipModule
from clip_retrieval.models.projection import Projection, text_projection, vision_projection
from clip_retrieval.models.towers import RetrievalModel

FROZEN_TOWERS = ("linear_projection", "adaptor")
"""Values of --trainable with which no layer of a tower is trained."""


def set_trainable(
    model: RetrievalModel,
    trainable: str = "all",
    *,
    freeze_vision: bool = False,
    freeze_text: bool = False,
    unlocked_image_blocks: int | None = None,
    unlocked_text_blocks: int | None = None,
    lora: LoraSettings | None = None,
    learn_scale: bool = True,
    learn_bias: bool = False,
) -> None:
    """Make the chosen parameters of `model` trainable and freeze all others.

    Args:
        trainable: "all"; "lora": a low-rank addition to linear layers; "bitfit": the biases, also of norms (Ben Zaken
            et al. 2022, arXiv:2106.10199); "linear_projection": the last projection of both towers; "adaptor": only
            the adaptor behind the image tower (both from Clip_crossmodal_retrieval). Logit scale and bias are
            trainable with each.
        freeze_vision: freeze the image tower.
        freeze_text: freeze the text tower.
        unlocked_image_blocks, unlocked_text_blocks: of the parameters above, only those in the last blocks of the tower
            and behind them; None: in all.
        lora: the settings of "lora".
        learn_scale: False for a loss without temperature: a parameter without a gradient would stop distributed
            training.
        learn_bias: True for a loss with a bias (SigLIP).

    A tower that is frozen except for its projection runs in evaluation mode and builds no graph. So do frozen layers in
    front of the trainable ones; frozen batch norms keep their statistics.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    # the towers, and their layers in evaluation mode
    model.frozen = []
    for part, is_frozen, blocks in (
        ("image", freeze_vision, unlocked_image_blocks),
        ("text", freeze_text, unlocked_text_blocks),
    ):
        modules = [model.clip.visual] if part == "image" else text_modules(model.clip)
        if trainable == "linear_projection" and not is_frozen:
            _set_requires_grad(_projection_parameters(model.clip, part), True)
        if trainable in FROZEN_TOWERS or is_frozen:
            model.frozen += modules
        else:
            unlocked, locked = _split_at_block(model.clip, part, blocks)
            _train_in_tower(model.clip, trainable, part, unlocked, lora or LoraSettings())
            model.frozen += [layer for module in modules for layer in frozen_layers(module, locked)]
    # adaptor, logit scale and bias
    if model.adaptor is not None:
        _set_requires_grad(model.adaptor.parameters(), True)
    _set_requires_grad([model.clip.logit_scale], learn_scale)
    if model.clip.logit_bias is not None:
        _set_requires_grad([model.clip.logit_bias], learn_bias)


def _split_at_block(clip: ClipModule, part: str, blocks: int | None) -> tuple[set[str], set[int]]:
    """Return the names of a tower's parameters in its last blocks and behind them, and the ids of its other ones."""
    own = {id(parameter) for parameter in (clip.visual.parameters() if part == "image" else text_parameters(clip))}
    places = place_parameters(clip) if blocks is not None else {}
    unlocked, locked = set(), set()
    for name, parameter in clip.named_parameters():
        if id(parameter) in own:
            if blocks is None or places[name].depth <= blocks:
                unlocked.add(name)
            else:
                locked.add(id(parameter))
    return unlocked, locked


def _train_in_tower(clip: ClipModule, trainable: str, part: str, names: set[str], lora: LoraSettings) -> None:
    """Make the parameters that `trainable` says trainable, as far as they are among `names`."""
    freeze = {"image": "--freeze_vision", "text": "--freeze_text"}[part]
    if trainable == "lora":
        projected = {id(parameter) for parameter in _projection(clip, part).parameters()}
        layers = [
            (module, name, parts)
            for owner, module, name, parts in find_linear(clip, lora.targets)
            if f"{owner}.{name}" in names and id(getattr(module, name)) not in projected
        ]
        if not layers:
            raise UserError(
                f"--lora_targets {lora.targets}: the {part} tower has no such linear layers; give other targets, or "
                f"add {freeze}"
            )
        widest = max(min(getattr(module, name).shape) for module, name, _ in layers)
        if lora.rank > widest:
            raise UserError(f"--lora_rank {lora.rank}: must be at most {widest}, the width of the {part} tower")
        add_lora(layers, lora)
        return
    chosen = [
        parameter
        for name, parameter in clip.named_parameters()
        if name in names and (trainable == "all" or (name.endswith("bias") and parameter.ndim == 1))
    ]
    if not chosen:
        raise UserError(f"--trainable {trainable}: the {part} tower has no such parameters; add {freeze}")
    _set_requires_grad(chosen, True)


def vision_is_frozen(model: RetrievalModel) -> bool:
    """Whether the image tower is frozen, except perhaps for its projection."""
    return model.clip.visual in model.frozen


def text_is_frozen(model: RetrievalModel) -> bool:
    """Whether the text tower is frozen, except perhaps for its projection."""
    return all(module in model.frozen for module in text_modules(model.clip))


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


def _projection(clip: ClipModule, tower: str) -> Projection:
    return vision_projection(clip) if tower == "image" else text_projection(clip)


def _projection_parameters(clip: ClipModule, tower: str) -> list[nn.Parameter]:
    parameters = _projection(clip, tower).parameters()
    if not parameters:
        freeze = {"image": "--freeze_vision", "text": "--freeze_text"}[tower]
        raise UserError(
            f"--trainable linear_projection: this model's {tower} tower has no projection; add {freeze} to train only "
            "the other one, or use --trainable adaptor"
        )
    return parameters
