"""Load the model and its tokenizer from the options or a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clip_retrieval.log import log
from clip_retrieval.losses import LOSSES
from clip_retrieval.models.build import BuiltModel, build_model, known_tags, rebuild_model
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.names import FOLDER, canonical
from clip_retrieval.models.tokenizers import build_tokenizer, has_pad_id_of, keep_vocabulary
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import Options


def load_model(options: Options, checkpoint: Checkpoint | None) -> tuple[RetrievalModel, BuiltModel, Any]:
    """Load the model of the options, or of a checkpoint.

    Returns:
        The model, on the CPU; its config and the source of its weights; its tokenizer.
    """
    # open_clip's module
    logit_bias = LOSSES[options.loss.loss].learns_bias and not options.run.eval
    if checkpoint is None:
        built = build_model(options.model, typed_model="vision_model" in options.given, logit_bias=logit_bias)
    else:
        name, typed = canonical(checkpoint.options["vision_model"]), options.model.vision_model
        if "vision_model" in options.given and typed.startswith(FOLDER):
            name = typed  # the folder has moved
        built = rebuild_model(
            checkpoint.model_config,
            checkpoint.preprocess,
            checkpoint.model,
            name=name,
            source=str(checkpoint.path),
            options=options.model,
            logit_bias=logit_bias,
        )
    # the towers, and an adaptor
    adaptor = built.adaptor_state is not None or (options.train.trainable == "adaptor" and not options.run.eval)
    model = RetrievalModel(built.clip, built.preprocess, adaptor=adaptor)
    if model.adaptor is not None and built.adaptor_state is not None:
        model.adaptor.load_state_dict(built.adaptor_state)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    activation = ", QuickGELU" if built.config.get("quick_gelu") else ""
    log.info(f"{built.name}{activation}, {size:,.1f} M parameters, weights: {built.weights}")
    # the tokenizer
    tokenizer = build_tokenizer(options.model, built)
    keep_vocabulary(built.config, tokenizer)
    model.masks_padding = has_pad_id_of(built.clip, tokenizer)
    return model, built, tokenizer


def record_model_name(options: Options, built: BuiltModel) -> Options:
    """Return the options with the name of the built model, which may come from a file or a folder.

    The user's spelling of this name is kept: it decides whether a bare state dict runs with QuickGELU.
    """
    if canonical(options.model.vision_model) == built.name:
        return options
    return replace(options, model=replace(options.model, vision_model=built.name))


def warn_of_random_weights(built: BuiltModel) -> None:
    """Log a warning if the weights, or parts of them, are random."""
    if built.weights == "none":
        tags = ", ".join(known_tags(built.name)) or "no known tag for this model; give a file"
        log.warning(f"THE WEIGHTS ARE RANDOM: results are at chance level. Give --pretrained ({tags}) or --resume")
    elif built.random:
        parts = ", ".join(built.random)
        log.warning(f"PARTS OF THE WEIGHTS ARE RANDOM ({parts}): results are at chance level until they are finetuned")
