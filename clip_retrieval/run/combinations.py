"""Options that exclude or need each other."""

from __future__ import annotations

from clip_retrieval.data.catalog import SHARDED, is_streamed
from clip_retrieval.data.readers.karpathy import FLICKR
from clip_retrieval.errors import UserError
from clip_retrieval.losses import LOSSES
from clip_retrieval.options import (
    AUTO,
    BELONGING,
    PREFIXES,
    DataOptions,
    EvalOptions,
    LossOptions,
    Options,
    TrainOptions,
)


def check_combinations(options: Options) -> None:
    """Raise UserError if options exclude each other."""
    _check_data(options.data, evaluate=options.run.eval)
    if options.model.keep_positions and not options.model.context_length:
        raise UserError(f"--keep_positions {options.model.keep_positions} needs --context_length; give both")
    if not options.run.eval:
        _check_training(options.train, options.evaluation)
        _check_loss(options.loss)
    _check_evaluation(options.evaluation, evaluate=options.run.eval)
    if options.run.overwrite and options.run.resume == AUTO:
        raise UserError("--overwrite and --resume auto contradict each other; drop one of them")


def _check_data(data: DataOptions, *, evaluate: bool) -> None:
    # files of shards and of streams
    for part in data.parts():
        for name in PREFIXES:
            if getattr(part, name) and part.name not in ("chinese", *SHARDED):
                raise UserError(f"--{name} is for --dataset chinese and webdataset; drop it, or --dataset {part.name}")
    if data.train_num_samples and not is_streamed(data):
        raise UserError(f"--train_num_samples is only for --dataset webdataset; drop it, or --dataset {data.name}")
    if data.image_cache and is_streamed(data) and not evaluate:
        raise UserError(f"--image_cache is not for --dataset {data.name}, whose images are streamed; drop it")
    # decoding on the GPU
    if data.decoder == "gpu" and data.augment not in ("none", "crop"):
        raise UserError(f"--decoder gpu is not for --augment {data.augment}; use --augment crop or --decoder fast")
    if data.decoder == "gpu" and data.image_cache:
        raise UserError("--decoder gpu is not for --image_cache, which stores decoded images; drop one of them")
    # held-out images
    held_out = " and ".join(f"--{split}_fraction" for split, fraction in data.fractions.items() if fraction)
    if held_out and is_streamed(data):
        raise UserError(f"{held_out}: not for --dataset {data.name}, whose images are streamed; give --val_data")
    if held_out and len(data.dataset) > 1:
        raise UserError(f"{held_out}: not for several data sets; give the first one a val or a test split")
    if sum(data.fractions.values()) >= 1:
        raise UserError(f"{held_out} leave no images to train on; lower them")
    # negatives and crops
    if data.hard_negatives and is_streamed(data) and not evaluate:
        raise UserError(f"--hard_negatives is not for --dataset {data.name}, whose pairs are streamed; drop it")
    if data.hard_negatives_by != DataOptions.hard_negatives_by and not data.hard_negatives:
        raise UserError(f"--hard_negatives_by {data.hard_negatives_by} needs --hard_negatives SHARE; give both")
    if data.negative_column and not evaluate and not {"csv", "karpathy", *FLICKR} & set(data.dataset):
        raise UserError(
            f"--negative_column is for --dataset csv and karpathy, not {data.name}; add --negative_column none"
        )
    if data.crop_scale != DataOptions.crop_scale and data.augment == "none":
        raise UserError(f"--crop_scale {data.crop_scale:g} needs --augment crop, auto, auto_flip or rand; give both")


def _check_training(train: TrainOptions, evaluation: EvalOptions) -> None:
    if train.grad_cache and train.accum_freq > 1:
        raise UserError("--grad_cache and --accum_freq set the same thing; give one of them")
    if train.freeze_vision and train.freeze_text and train.trainable != "adaptor":
        raise UserError("--freeze_vision and --freeze_text together leave nothing to train; drop one of them")
    for name in BELONGING["trainable"]:
        if train.trainable != "lora" and getattr(train, name) != getattr(TrainOptions, name):
            raise UserError(f"--{name} needs --trainable lora, not {train.trainable}; give both, or drop it")
    if train.optimizer == "lion" and train.eps != TrainOptions.eps:
        raise UserError(f"--eps {train.eps:g} has no effect with --optimizer lion; drop one of them")
    for name, frozen in (
        ("unlocked_image_blocks", "freeze_vision"),
        ("unlocked_text_blocks", "freeze_text"),
        ("lr_image", "freeze_vision"),
        ("lr_text", "freeze_text"),
    ):
        if getattr(train, name) is not None:
            if getattr(train, frozen):
                raise UserError(f"--{name} and --{frozen} contradict each other; drop one of them")
            if train.trainable in ("linear_projection", "adaptor"):
                raise UserError(f"--{name} has no effect with --trainable {train.trainable}; drop one of them")
    if train.drop_path and train.trainable in ("linear_projection", "adaptor"):
        raise UserError(f"--drop_path has no effect with --trainable {train.trainable}; drop one of them")
    if train.decay_fraction and train.schedule != "wsd":
        raise UserError(f"--decay_fraction {train.decay_fraction:g} needs --schedule wsd; give both or drop it")
    if train.start_image_size_until != TrainOptions.start_image_size_until and not train.start_image_size:
        raise UserError(
            f"--start_image_size_until {train.start_image_size_until:g} needs --start_image_size; give both or drop it"
        )
    if train.patience and not (evaluation.eval_every or evaluation.eval_steps):
        raise UserError(f"--patience {train.patience} counts evaluations, and --eval_every 0 drops them; drop one")
    if train.swa_start and not train.max_steps and train.swa_start > train.epochs:
        raise UserError(f"--swa_start {train.swa_start} is after the last epoch ({train.epochs}); lower it")


def _check_loss(options: LossOptions) -> None:
    loss = LOSSES[options.loss]
    for name in ("margin", "label_smoothing", "i2t_weight"):
        if getattr(options, name) != getattr(LossOptions, name) and name not in loss.arguments:
            raise UserError(f"--{name} is not for --loss {options.loss}; drop one of them")
    if options.temperature and not loss.learns_scale:
        raise UserError(f"--temperature: --loss {options.loss} has none; drop one of them")
    if not options.distill_from:
        for name in ("distill_kind", "distill_weight"):
            if getattr(options, name) != getattr(LossOptions, name):
                raise UserError(f"--{name} needs --distill_from CKPT or start; give both")


def _check_evaluation(evaluation: EvalOptions, *, evaluate: bool) -> None:
    for name in ("rerank", "ensemble"):
        if getattr(evaluation, name) and not evaluate:
            raise UserError(f"--{name} is for --eval, after training; drop it")
    if not evaluation.zero_shot_eval:
        for name in BELONGING["zero_shot_eval"]:
            if getattr(evaluation, name):
                alias = " (--imagenet_eval_steps)" if name == "zero_shot_steps" else ""
                raise UserError(f"--{name}{alias} needs --zero_shot_eval DATA or --imagenet_eval")
    if evaluation.retention_root and not evaluation.retention_dataset:
        raise UserError("--retention_root needs --retention_dataset; give both")
    if evaluation.retention_weight and not evaluation.retention_dataset:
        if not evaluation.zero_shot_eval:
            raise UserError("--retention_weight needs --retention_dataset or --zero_shot_eval; give one")
        if evaluation.zero_shot_steps:
            raise UserError("--retention_weight scores with each val evaluation; drop --zero_shot_steps")
    if evaluation.ensemble_mode != EvalOptions.ensemble_mode and not evaluation.ensemble:
        raise UserError(f"--ensemble_mode {evaluation.ensemble_mode} needs --ensemble CKPT; give both, or drop it")
