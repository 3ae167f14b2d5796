"""The systems whose models and checkpoints are supported, in one table: how each differs from open_clip."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from clip_retrieval.models import chinese_clip, long_clip, names, simple_clip_weights, transformers_weights
from clip_retrieval.models.model_config import Config, State
from clip_retrieval.models.siglip_model import SiglipCLIP
from clip_retrieval.models.simple_clip_model import SimpleCLIP
from clip_retrieval.models.word_piece import ChineseTokenizer, WordPieceTokenizer


@dataclass(frozen=True)
class Towers:
    """Models whose towers may start from their own weights.

    Attributes:
        vision_models, text_models: known names of the towers; empty for a family without such towers.
        pair: config of two of these names; None if --vision_model alone names a config of the family.
        vision_weights, text_weights: rename the weights of a tower; empty for other weights.
        vision_source, text_kind: descriptions of these weights, for messages.
    """

    vision_models: Collection[str] = ()
    text_models: Collection[str] = ()
    pair: Callable[[str, str], Config] | None = None
    vision_weights: Callable[[State], State] = lambda state: {}
    text_weights: Callable[[State], State] = lambda state: {}
    vision_source: str = ""
    text_kind: str = ""


@dataclass(frozen=True)
class Family:
    """One system. The defaults are open_clip's.

    Attributes:
        name: name of the system.
        is_checkpoint: whether a weight file is the system's, from its state dict and the keys of the file.
        to_open_clip: renames a state dict of the system to the names of our modules.
        quick_gelu: whether the system's checkpoints run with QuickGELU.
        model: our name of the system's only model.
        infer: model name and config of a state dict (and its source, for messages), if the system's checkpoints define
            their whole model.
        preprocess: PreprocessCfg of these checkpoints, as overrides.
        is_config: whether a model config is the family's.
        config_name: the system's own name for a config, or None.
        module: class that is built from the family's configs instead of open_clip's.
        tokenizer: class of the tokenizer instead of open_clip's.
        towers: names and initial weights of single towers.
    """

    name: str
    is_checkpoint: Callable[[State, Iterable[Any]], bool] = lambda state, keys: False
    to_open_clip: Callable[[State], State] = lambda state: state
    quick_gelu: bool = False
    model: str | None = None
    infer: Callable[[State, str], tuple[str, Config]] | None = None
    preprocess: Config = field(default_factory=dict)
    is_config: Callable[[Config], bool] = lambda config: False
    config_name: Callable[[Config], str | None] = lambda config: None
    module: type[nn.Module] | None = None
    tokenizer: type[WordPieceTokenizer] | None = None
    towers: Towers = Towers()


def _crossmodal_to_open_clip(state: State) -> State:
    """Rename Clip_crossmodal_retrieval's CLIP with an adaptor."""
    clip, layers = "clip_model.", "additional_layers.fc."
    ordered = sorted(state, key=lambda name: not name.startswith(clip))  # the trained scale is outside of it
    return {name.removeprefix(clip).replace(layers, "adaptor."): state[name] for name in ordered}


OPEN_CLIP = Family("open_clip")
OURS = Family("ours")
OPENAI_ARCHIVE = Family("openai archive", quick_gelu=True)
TRANSFORMERS = Family(
    "transformers",
    is_checkpoint=lambda state, keys: any(name.startswith("vision_model.") for name in state),
    to_open_clip=transformers_weights.to_open_clip,
    is_config=lambda config: "timm_kwargs" in config["vision_cfg"],
    module=SiglipCLIP,
)
FAMILIES = (
    Family(
        "chinese-clip",
        is_checkpoint=lambda state, keys: any(name.startswith("bert.") for name in state),
        to_open_clip=chinese_clip.to_open_clip,
        infer=lambda state, source: (names.UNNAMED, chinese_clip.infer_config(state, source)),
        preprocess=chinese_clip.PREPROCESS,
        is_config=chinese_clip.is_chinese_clip,
        config_name=chinese_clip.model_name,
        tokenizer=ChineseTokenizer,
        towers=Towers(
            vision_models=chinese_clip.VISION_MODELS,
            text_models=chinese_clip.TEXT_MODELS,
            pair=chinese_clip.reference_config,
            vision_weights=chinese_clip.vision_weights,
            text_weights=chinese_clip.bert_to_open_clip,
            vision_source="the weights of a CLIP (visual.*)",
            text_kind="BERT",
        ),
    ),
    Family(
        "Clip_crossmodal_retrieval",
        is_checkpoint=lambda state, keys: any(name.startswith("clip_model.") for name in state),
        to_open_clip=_crossmodal_to_open_clip,
        quick_gelu=True,
    ),
    Family(
        "Long-CLIP",
        is_checkpoint=lambda state, keys: {long_clip.POSITIONS, long_clip.STRETCHED} <= state.keys(),
        to_open_clip=long_clip.to_open_clip,
        infer=long_clip.infer,
    ),
    Family(
        "simple-clip",
        is_checkpoint=lambda state, keys: simple_clip_weights.is_reference(state),
        to_open_clip=simple_clip_weights.to_open_clip,
        infer=simple_clip_weights.infer,
        preprocess=simple_clip_weights.PREPROCESS,
        is_config=lambda config: "torchvision_model_name" in config["vision_cfg"],
        module=SimpleCLIP,
        tokenizer=WordPieceTokenizer,
        towers=Towers(
            vision_models=simple_clip_weights.IMAGE_MODELS,
            text_models=(simple_clip_weights.TEXT_MODEL,),
            vision_weights=simple_clip_weights.trunk_weights,
            text_weights=simple_clip_weights.distilbert_weights,
            vision_source="torchvision's weights for it",
            text_kind="DistilBERT",
        ),
    ),
    Family(
        "clip-training",
        # other systems have a model_state_dict as well, but no global_step
        is_checkpoint=lambda state, keys: {"model_state_dict", "global_step"} <= {*keys},
        quick_gelu=True,
        model="RN50-text6",
    ),
    TRANSFORMERS,
)


def find_family(config: Config) -> Family:
    """Return the family of a model config."""
    return next((family for family in FAMILIES if family.is_config(config)), OPEN_CLIP)


def recognise(state: State, keys: Iterable[Any]) -> Family:
    """Return the family of a weight file, from its state dict and the keys of the file."""
    return next((family for family in FAMILIES if family.is_checkpoint(state, keys)), OPEN_CLIP)
