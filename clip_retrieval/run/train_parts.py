"""Make the trainer and the loader of a finetune."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clip_retrieval.data.batches.loader import Loader, TrainLoader
from clip_retrieval.data.batches.sampler import Sampler
from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.batches.train_split import EncodeFrozen, IndexedTrainSplit, TrainSplit
from clip_retrieval.data.batches.word_dropout import WordDropout
from clip_retrieval.data.captions import Tokens, padding_id
from clip_retrieval.data.catalog import skips_unreadable
from clip_retrieval.data.pixels.pixels import Pixels
from clip_retrieval.distributed import Processes
from clip_retrieval.encode import encode_captions, encode_images, encoding_model
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.losses import LOSSES
from clip_retrieval.models.any_size import accept_smaller_images
from clip_retrieval.models.batch_norm import share_statistics
from clip_retrieval.models.drop_path import set_drop_path
from clip_retrieval.models.grad_checkpointing import enable_grad_checkpointing
from clip_retrieval.models.lora import LoraSettings
from clip_retrieval.models.patch_dropout import set_patch_dropout
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import FROZEN_TOWERS, set_trainable, text_is_frozen, vision_is_frozen
from clip_retrieval.options import LossOptions, Options, TrainOptions
from clip_retrieval.training.hard_negatives import HardNegatives
from clip_retrieval.training.trainer import Trainer

COMPILED_LENGTHS = 16  # caption lengths of a compiled text tower are multiples of this


def make_trainer(
    options: TrainOptions,
    loss_options: LossOptions,
    model: RetrievalModel,
    precision: str,
    device: torch.device,
    processes: Processes,
) -> Trainer:
    """Set the trainable parameters and make the loss and the optimizer."""
    # trainable parameters
    loss = LOSSES[loss_options.loss]
    if processes.world_size > 1 and not (options.freeze_vision or options.trainable in FROZEN_TOWERS):
        # may replace modules, so it comes first
        model.clip.visual = share_statistics(model.clip.visual, device, shares_gpus=processes.shares_gpus)
    set_trainable(
        model,
        options.trainable,
        freeze_vision=options.freeze_vision,
        freeze_text=options.freeze_text,
        unlocked_image_blocks=options.unlocked_image_blocks,
        unlocked_text_blocks=options.unlocked_text_blocks,
        lora=LoraSettings(
            options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_targets, options.seed
        ),
        learn_scale=loss.learns_scale and loss_options.temperature is None,
        learn_bias=loss.learns_bias,
    )
    # how the towers are computed
    if options.drop_path:
        set_drop_path(model.clip, options.drop_path)
    if options.patch_dropout:
        if vision_is_frozen(model):
            raise UserError("--patch_dropout: the image tower is frozen; drop it, or train the tower")
        set_patch_dropout(model.clip.visual, options.patch_dropout)
    if options.start_image_size:
        if vision_is_frozen(model):
            raise UserError("--start_image_size: the image tower is frozen; drop it, or train the tower")
        accept_smaller_images(model.clip.visual, model.preprocess["size"], options.start_image_size)
    if loss_options.temperature is not None:
        model.clip.logit_scale.data.fill_(-math.log(loss_options.temperature))
    if options.grad_checkpointing:
        enable_grad_checkpointing(model.clip)
    if device.type == "cuda":
        model.clip.visual.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
    return Trainer(
        model,
        loss_options,
        options,
        precision=precision,
        device=device,
        processes=processes,
    )


def make_frozen_encoder(
    model: RetrievalModel,
    batch_size: int | None,
    precision: str,
    device: torch.device,
    processes: Processes,
    *,
    images_vary: bool,
    texts_vary: bool,
) -> EncodeFrozen:
    """Return a function that encodes a split with the frozen towers, unless its images or texts vary.

    Features are on the CPU, and clones: unlike inference tensors, these can be part of a graph.
    """

    def encode_frozen(split: Split, num_workers: int) -> tuple[Pixels | Tensor, Tokens | Tensor]:
        images: Pixels | Tensor = split.pixels
        texts: Tokens | Tensor = split.tokens
        encoding: dict[str, Any] = {
            "batch_size": batch_size,
            "device": device,
            "processes": processes,
        }
        if vision_is_frozen(model) and not images_vary:
            log.info("the image tower is frozen: all images are encoded once, before the first step")
            encoder = encoding_model(model, precision)
            features = encode_images(encoder.pooled_image, split.pixels, num_workers=num_workers, **encoding)
            images = features.cpu().clone()
        if text_is_frozen(model) and not texts_vary:
            log.info("the text tower is frozen: all captions are encoded once, before the first step")
            encoder = encoding_model(model, precision)
            encoding["trim"] = model.trims_text
            features = encode_captions(encoder.pooled_text, split.dataset.texts, split.tokens, **encoding)
            texts = features.cpu().clone()
        return images, texts

    return encode_frozen


def make_loader(
    options: Options,
    train: TrainSplit,
    sampler: Sampler,
    model: RetrievalModel,
    tokenizer: Any,
    *,
    precision: str,
    device: torch.device,
    processes: Processes,
    teacher_sees_batches: bool = False,
) -> Loader:
    """Make the loader of this process's part of the batches; frozen towers encode the split here."""
    # frozen features; a teacher that sees the batches needs pixels and tokens
    encode_frozen = None
    if not options.train.no_feature_cache and not teacher_sees_batches:
        encode_frozen = make_frozen_encoder(
            model,
            options.evaluation.eval_batch_size,
            precision,
            device,
            processes,
            # a mixture's broken images are only found while it trains
            images_vary=options.data.augment != "none"
            or (len(options.data.dataset) > 1 and skips_unreadable(options.data)),
            texts_vary=options.data.word_dropout > 0,
        )
    # the batches
    loader: Loader = train.make_loader(
        sampler,
        trim=model.trims_text,
        bucket=COMPILED_LENGTHS if options.train.compile else 1,
        device=device,
        processes=processes,
        encode_frozen=encode_frozen,
    )
    if isinstance(train, IndexedTrainSplit) and isinstance(loader, TrainLoader) and train.hard_negatives:
        loader = HardNegatives(
            loader,
            model,
            replace(train.data, pixels=train.plain_pixels),
            precision=precision,
            batch_size=options.evaluation.eval_batch_size,
            num_workers=options.data.num_workers,
            device=device,
            processes=processes,
        )
    if options.data.word_dropout:
        pad, rate = padding_id(tokenizer), options.data.word_dropout
        loader = WordDropout(loader, rate, pad=pad, seed=options.train.seed, processes=processes)
    return loader
