"""All options of a run.

Each group of options is a dataclass, and the command line is built from the groups (`command_line`). `run.settings`
merges the values. Nothing here imports torch, so that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_retrieval.errors import UserError
from clip_retrieval.losses import DISTILLATIONS, LOSSES

AUTO = "auto"
NO_PRESET = "none"
PRESETS = {path.stem: path for path in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
"""The files of --preset, by name."""
MAX_IMAGE_PIXELS = 500_000_000  # enough for scans and maps; takes 2 GB of memory
OPTIMIZERS = ("adamw", "lion", "muon")
RERANKINGS = ("dual_softmax", "inverted_softmax", "qb_norm", "csls", "dist_norm")
"""The methods of --rerank, see `evaluation.rerank`."""
NUMBER_LIMIT = 2**63  # the absolute value of a number must be less


def option(
    default: Any,
    help: str,
    *aliases: str,
    choices: Sequence[str] = (),
    also: dict[str, str] | None = None,
    flags: dict[str, str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    auto: bool | str = False,
    repeatable: bool = False,
    from_checkpoint: bool = True,
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: the default value.
        help: the text for --help.
        aliases: other spellings of the option, with dashes.
        choices: the valid values.
        also: from another spelling of a value to the canonical one.
        flags: from a flag to the value that it sets.
        minimum, above, below, maximum: a number must be at least `minimum`, greater than `above`, less than `below`
            and at most `maximum`.
        auto: accept the word "auto", or this word, and store None.
        repeatable: store a tuple if the option is given several times.
        from_checkpoint: take the value from a checkpoint when a run is resumed or evaluated.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "aliases": aliases,
            "choices": tuple(choices),
            "also": also or {},
            "flags": flags or {},
            "minimum": minimum,
            "above": above,
            "below": below,
            "maximum": maximum,
            "auto": AUTO if auto is True else auto,
            "repeatable": repeatable,
            "from_checkpoint": from_checkpoint,
        },
    )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return the values of a repeatable option, given once or several times."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _one_or_two(value: Any, name: str) -> Any:
    """Return the side of a square, or height and width. Raises UserError for more numbers."""
    size = as_tuple(value)
    if len(size) > 2:
        raise UserError(f"--{name} {' '.join(map(str, size))}: give one side, or height and width")
    return size[0] if len(set(size)) == 1 else size


@dataclass
class ModelOptions:
    """model"""

    vision_model: str = option(
        "ViT-B/32",
        "CLIP model: an OpenAI name, an open_clip name, hf-hub:ORG/NAME, local-dir:PATH, a model config .json, or "
        "a built-in one: tiny, small, RN50-text6 (clip-training's), resnet18, resnet50, efficientnet (simple-clip's, "
        "with DistilBERT as text tower)",
        "--model",
        "--image_encoder_name",
    )
    text_model: str | None = option(
        None,
        "text tower: RoBERTa-wwm-ext-base-chinese, RoBERTa-wwm-ext-large-chinese or RBT3-chinese for Chinese-CLIP's "
        "image towers, distilbert-base-uncased for simple-clip's (default: the model's)",
        "--text_encoder_name",
    )
    tokenizer: str | None = option(
        None,
        "tokenizer of a Hugging Face text tower: a vocab.txt, a local folder or a hub name (default: the "
        "checkpoint's, else the model's)",
    )
    pretrained: str | None = option(
        None,
        "initial weights: an open_clip tag, a torchvision tag for simple-clip's image towers (IMAGENET1K_V1), a file, "
        "a folder of transformers, or `none` for random weights (default: openai for OpenAI's names, the hub's for a "
        "hub id, else none)",
        "--clip_weight_path",
    )
    pretrained_key: str | None = option(
        None,
        "weights to take from a --pretrained file with several, such as state_dict or model_ema (default: averaged "
        "ones; the log lists them)",
    )
    text_pretrained: str | None = option(
        None,
        "initial weights of the text tower, with --text_model or simple-clip's image towers: folder, weight file or "
        "hub name of a BERT or DistilBERT; --pretrained then is for the image tower (default: none)",
        "--bert_weight_path",
    )
    context_length: int | None = option(None, "maximum length of captions, in tokens (default: the model's)", minimum=3)
    keep_positions: int | None = option(
        None,
        "with a longer --context_length: number of first text position embeddings that stay as they are, while the "
        "others are stretched; Long-CLIP keeps 20 (default: interpolate all)",
        minimum=1,
    )
    image_size: tuple[int, ...] | int | None = option(
        None,
        "side of the square input image, or its height and width, in pixels; position embeddings are interpolated "
        "(default: the model's)",
        minimum=1,
        below=2049,
    )

    def __post_init__(self) -> None:
        self.image_size = _one_or_two(self.image_size, "image_size")


@dataclass
class DataOptions:
    """data"""

    dataset: tuple[str, ...] = option(
        ("coco",),
        "coco, flickr30k, flickr8k, karpathy, csv, chinese, webdataset, huggingface, shapes (built in, needs no files) "
        "or simple-clip's textcap, sbucaptions, yfcc7m and combined; repeat it for a mixture, with one --dataset_root "
        "for each data set (also --annotations, ...; auto: the data set's own)",
        "--dataset_name",
        repeatable=True,
    )
    dataset_weights: tuple[float, ...] | None = option(
        None, "weight of each data set of a mixture in an epoch (default: all pairs of all)", above=0
    )
    dataset_root: str | tuple[str, ...] = option(
        "datasets", "folder of the data set", "--dataset_path", repeatable=True
    )
    annotations: str | tuple[str | None, ...] | None = option(
        None,
        "captions file instead of the one in dataset_root (coco, karpathy, csv)",
        "--train_annotation_file",
        auto=True,
        repeatable=True,
    )
    image_dir: str | tuple[str | None, ...] | None = option(
        None,
        "folder of the images instead of the one in dataset_root (coco, karpathy, csv)",
        "--train_img_dir",
        auto=True,
        repeatable=True,
    )
    train_data: str | tuple[str | None, ...] | None = option(
        None,
        "train split, instead of the one in dataset_root; chinese: LMDB folder, or prefix of _imgs.tsv and "
        "_texts.jsonl; webdataset: shards, also of http(s), s3, gs and hf ('shards/{00000..01537}.tar')",
        auto=True,
        repeatable=True,
    )
    val_data: str | tuple[str | None, ...] | None = option(
        None, "val split, like --train_data", auto=True, repeatable=True
    )
    val_fraction: float = option(
        0.0,
        "share of the images to hold out as val split from data without one; a hash of the image's name decides, so "
        "further rows move no image",
        minimum=0,
        below=1,
    )
    test_fraction: float = option(0.0, "the same for the test split", minimum=0, below=1)
    no_restval: bool = option(False, "coco: train on the train images only (82,783), without restval (30,504)")
    image_column: str = option("image", "csv: column of the image path; huggingface: column of the image")
    caption_column: str = option("caption", "csv and huggingface: column of the caption")
    split_column: str = option(
        "split",
        "csv: column of the split (train, val, test); if it is missing, all rows are used for training, or by --eval, "
        "but for --val_fraction and --test_fraction",
    )
    negative_column: str | None = option(
        None,
        "csv: column of negative captions, a text or a list of texts, of which a random one joins the training batch "
        "as in NegCLIP; karpathy, flickr8k, flickr30k: their key in a sentence of the JSON",
        auto="none",
    )
    caption_key: str | None = option(
        None, "webdataset: key of the caption or list of captions in the .json (default: the .txt, else `caption`)"
    )
    train_num_samples: int | None = option(
        None, "webdataset: pairs in an epoch (default: all, from sizes.json or, of local shards, counted)", minimum=2
    )
    shuffle_buffer: int = option(4096, "webdataset: size of the shuffle buffer, in pairs over all processes", minimum=0)
    caption_prefix: str | None = option(
        None, "text before every caption, such as 'a photo of ', in training and evaluation; none: no text", auto="none"
    )
    caption_sampling: str = option(
        "all",
        "all: every caption once an epoch; one: every image once an epoch, with a random caption (streamed shards: "
        "always one)",
        choices=("all", "one"),
    )
    hard_negatives: float = option(
        0.0,
        "share of each training batch that are near neighbours of others in it, by features that the model computes at "
        "the start of each epoch",
        minimum=0,
        maximum=1,
    )
    hard_negatives_by: str = option(
        "image", "with --hard_negatives: the features that are compared, image or text", choices=("image", "text")
    )
    augment: str = option(
        "none",
        "augmentation of training images: none, random crop, random crop with AutoAugment, the same with half of the "
        "images mirrored, as in Chinese-CLIP (captions may name left and right), or random crop with RandAugment",
        choices=("none", "crop", "auto", "auto_flip", "rand"),
        flags={"--use_augment": "auto"},
    )
    crop_scale: float = option(
        0.9, "with --augment: smallest share of the image's area in a random crop", above=0, below=1
    )
    word_dropout: float = option(0.0, "share of the words of training captions to drop at random", minimum=0, below=1)
    decoder: str = option(
        "pillow",
        "image decoder: pillow as in the reference; fast, 2.5 times faster, with pixels that differ by one or two grey "
        "levels; or gpu: baseline JPEG files are decoded and resized on the GPU, with pixels that differ more",
        choices=("pillow", "fast", "gpu"),
    )
    skip_broken: bool = option(
        False,
        "skip missing and unreadable images, and count them in the log, instead of stopping (shards and Hugging Face "
        "data sets: always skipped in training); scripts/check_data.py lists them",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "maximum pixels of an image, against small files that decode to huge images; an image takes up to 4 bytes a "
        "pixel in each loader process",
        minimum=1,
    )
    image_cache: str | None = option(
        None,
        "folder that caches decoded, resized images for later epochs and runs",
        from_checkpoint=False,
    )
    num_workers: int | None = option(
        None,
        "loader processes of each training process",
        minimum=0,
        auto=True,
        from_checkpoint=False,
    )

    def __post_init__(self) -> None:
        self.dataset = as_tuple(self.dataset)

    @property
    def name(self) -> str:
        """Name of the data set for messages and file names; `coco+sbucaptions` for a mixture."""
        return "+".join(self.dataset)

    @property
    def fractions(self) -> dict[str, float]:
        """The share of the images that is held out for each split."""
        return {"val": self.val_fraction, "test": self.test_fraction}

    @property
    def place(self) -> str:
        """Paths of the data, for messages."""
        places = self.annotations or self.train_data or self.val_data or self.dataset_root
        return ", ".join(place for place in as_tuple(places) if place)

    def parts(self) -> list[DatasetOptions]:
        """Return the options of each data set of a mixture, or of the one data set.

        Raises UserError if an option was given neither once nor once for each data set.
        """
        names = self.dataset
        if self.dataset_weights and len(self.dataset_weights) != len(names):
            raise UserError(
                f"--dataset_weights has {len(self.dataset_weights)} values, --dataset {len(names)}; give one for each"
            )
        values: dict[str, tuple[Any, ...]] = {}
        for name in REPEATABLE:
            given = as_tuple(getattr(self, name))
            if len(given) == 1 and (given[0] is None or name == "dataset_root" or len(names) == 1):
                given *= len(names)  # one folder for all data sets
            if len(given) != len(names):
                raise UserError(
                    f"--{name} was given {len(given)} time{'s' * (len(given) > 1)}, --dataset {len(names)}: give it "
                    "once for each data set, in their order; auto is the default"
                )
            values[name] = given
        shared = vars(self) | {"dataset_weights": None}
        return [
            DatasetOptions(**shared | {name: given[i] for name, given in values.items()}) for i in range(len(names))
        ]


class DatasetOptions(DataOptions):
    """The data options of a single data set: each path is given once, or not at all."""

    dataset_root: str
    annotations: str | None
    image_dir: str | None
    train_data: str | None
    val_data: str | None


@dataclass
class LossOptions:
    """loss"""

    loss: str = option(
        "infonce",
        "contrastive loss; siglip starts scale and bias at 10 and -10 unless the weights hold a bias (a CLIP's do not)",
        choices=tuple(LOSSES),
        also={"cross_entropy": "infonce", "cos_embedd": "margin"},
        flags={"--use_siglip": "siglip"},
    )
    margin: float | None = option(
        None,
        "margin loss: cosine above which a negative pair has a loss (default: 0.1); triplet loss: by how much a "
        "positive must exceed the hardest negative (default: 0.2)",
    )
    label_smoothing: float = option(
        0.0, "infonce: share of the target that is spread over all pairs of the batch", minimum=0, below=1
    )
    i2t_weight: float = option(
        0.5,
        "infonce and triplet: weight of image-to-text; text-to-image has the rest",
        minimum=0,
        maximum=1,
    )
    temperature: float | None = option(
        None, "infonce and siglip: fixed temperature, 1 / logit scale; none: learned", minimum=1e-4, auto="none"
    )
    distill_from: str | None = option(
        None,
        "teacher whose features are imitated in training: a checkpoint or weight file, a model name, or start (the "
        "model as the run starts, to forget less)",
        auto="none",
    )
    distill_kind: str = option(
        "relational",
        "relational: the similarities in the batch (KL divergence); feature: the features themselves (1 - cosine)",
        choices=DISTILLATIONS,
    )
    distill_weight: float = option(1.0, "factor on the distillation loss", minimum=0)


@dataclass
class TrainOptions:
    """training"""

    epochs: int = option(10, "epochs of the run", "--num_epoch", "--num_epochs", "--max_epochs", minimum=1)
    max_steps: int | None = option(None, "steps of the run, instead of --epochs", minimum=1)
    batch_size: int = option(256, "global batch size, in pairs over all processes", "-b", minimum=2)
    grad_cache: int | None = option(
        None,
        "chunk of pairs that a process computes at a time, to fit a large batch into memory; same gradients, twice the "
        "forward passes; none: the whole batch",
        minimum=1,
        auto="none",
    )
    accum_freq: int = option(1, "number of chunks, instead of --grad_cache", minimum=1)
    lr: float = option(1e-5, "peak learning rate", "--learning_rate", "-lr", above=0)
    lr_image: float | None = option(None, "peak learning rate of the image tower; none: --lr", above=0, auto="none")
    lr_text: float | None = option(None, "peak learning rate of the text tower; none: --lr", above=0, auto="none")
    lr_head: float | None = option(
        None, "peak learning rate of projections, logit scale and bias, and adaptor; none: --lr", above=0, auto="none"
    )
    layer_decay: float | None = option(
        None,
        "factor of the learning rate from each block of a tower to the one before it, e.g. 0.65",
        above=0,
        below=1,
        auto="none",
    )
    optimizer: str = option(
        "adamw",
        "adamw; lion, for a 3-10 times lower --lr and higher --weight_decay; or muon for the linear layers of the "
        "towers, with AdamW for all else",
        choices=OPTIMIZERS,
    )
    beta1: float = option(0.9, "beta1 of AdamW and Lion", minimum=0, below=1)
    beta2: float | None = option(None, "beta2 of AdamW and Lion (default: 0.98; 0.99 for Lion)", minimum=0, below=1)
    eps: float = option(1e-6, "AdamW's epsilon", minimum=1e-30)
    weight_decay: float = option(
        0.2,
        "weight decay; not applied to biases, norms, logit scale and position embeddings",
        "--wd",
        "-wd",
        minimum=0,
    )
    warmup: float | None = option(
        None,
        "steps of linear warmup, or a fraction of the run if below 1 (default: 500, but at most a tenth of the run)",
        minimum=0,
        auto=True,
    )
    schedule: str = option(
        "cosine",
        "learning rate after the warmup: cosine or linear to 0, constant, or wsd: constant, then linear to 0",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_fraction: float | None = option(
        None, "with --schedule wsd: share of the run in which the rate falls (default: 0.2)", above=0, below=1
    )
    patience: int | None = option(
        None, "stop after this number of evaluations in a row without a new best on val", minimum=1, auto="none"
    )
    ema: float | None = option(
        None,
        "decay of an exponential moving average of the weights, such as 0.999, scored beside them on val; best.pt is "
        "the better one",
        above=0,
        below=1,
        auto="none",
    )
    swa_start: int | None = option(
        None,
        "epoch from whose end on the weights at the end of each epoch are averaged, into swa.pt",
        minimum=1,
        auto="none",
    )
    grad_clip: float | None = option(None, "maximum norm of the gradient", above=0, auto="none")
    trainable: str = option(
        "all",
        "trainable parameters: all, low-rank additions to linear layers (LoRA), biases (BitFit), the two projections, "
        "or a small adaptor after the image tower; the logit scale with each",
        choices=("all", "lora", "bitfit", "linear_projection", "adaptor"),
    )
    lora_rank: int = option(16, "LoRA: rank of the additions", minimum=1)
    lora_alpha: float = option(16.0, "LoRA: the additions are multiplied by alpha / rank", above=0)
    lora_dropout: float = option(
        0.0, "LoRA: probability to drop an input of the additions, for all tokens of a forward pass", minimum=0, below=1
    )
    lora_targets: str = option(
        "attention",
        "LoRA: linear layers that are adapted: of attention, all others (mlp), or all; not the projections",
        choices=("attention", "mlp", "all"),
    )
    drop_path: float = option(
        0.0,
        "stochastic depth: share of the items of a batch for which the last block of a tower is skipped in training; "
        "the rate rises linearly with depth",
        minimum=0,
        below=1,
    )
    patch_dropout: float = option(
        0.0, "share of an image's patches that a ViT does not see in training, as in FLIP", minimum=0, below=1
    )
    start_image_size: tuple[int, ...] | int | None = option(
        None,
        "side of the images, or their height and width, with which the run starts: training images are reduced to it, "
        "for faster steps (default: the model's size)",
        minimum=1,
        below=2049,
    )
    start_image_size_until: float = option(
        0.7, "with --start_image_size: share of the run's steps that see the reduced images", above=0, below=1
    )
    freeze_vision: bool = option(False, "freeze the image tower")
    freeze_text: bool = option(False, "freeze the text tower")
    unlocked_image_blocks: int | None = option(
        None, "train only the last N blocks of the image tower and the layers behind them", minimum=0, auto="all"
    )
    unlocked_text_blocks: int | None = option(
        None, "train only the last N blocks of the text tower and the layers behind them", minimum=0, auto="all"
    )
    precision: str = option(
        "auto",
        "training precision; auto: bf16 AMP if the GPU supports it, else fp16 AMP; fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
        flags={"--fp16_precision": "fp16"},
    )
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    no_feature_cache: bool = option(
        False,
        "run frozen towers, and the teacher, in every epoch, instead of caching their features (same final weights)",
    )
    compile: bool = option(
        False,
        "compile the towers, and replay them as CUDA graphs on a GPU: a slow start, then faster steps",
        from_checkpoint=False,
    )
    seed: int = option(99, "random seed", minimum=0)
    deterministic: bool = option(
        False, "on a GPU: bit-identical weights from run to run, but slower (a CPU is always deterministic)"
    )

    def __post_init__(self) -> None:
        self.start_image_size = _one_or_two(self.start_image_size, "start_image_size")


@dataclass
class EvalOptions:
    """evaluation"""

    eval_split: str = option("test", "split that --eval scores", choices=("val", "test"))
    eval_batch_size: int | None = option(
        None,
        "images or captions in an evaluation batch",
        "--valid_batch_size",
        minimum=1,
        auto=True,
        from_checkpoint=False,
    )
    eval_precision: str = option("fp32", "precision of the towers in evaluation", choices=("fp32", "bf16", "fp16"))
    eval_every: int = option(
        1,
        "epochs between evaluations on the val split; 0: only at the end",
        "--valid_epoch_interval",
        minimum=0,
        also={"-1": "0"},
    )
    eval_steps: int = option(
        0,
        "steps between additional evaluations on the val split; 0: none",
        "--valid_step_interval",
        minimum=0,
        also={"-1": "0"},
    )
    no_eval_first: bool = option(False, "skip the evaluation before the first step")
    zero_shot_eval: str | None = option(
        None,
        "zero-shot evaluation during training: cifar10, cifar100, stl10, imagenet, or a folder with one subfolder of "
        "images for each class",
        flags={"--imagenet_eval": "imagenet"},
        auto="none",
    )
    zero_shot_root: str | None = option(None, "folder of the zero-shot data set (default: --dataset_root)")
    zero_shot_class_names: str | None = option(None, "file of class names (default: the data set's)")
    zero_shot_templates: str | None = option(
        None, "prompt templates: imagenet, cifar, simple, stl10, chinese, or a file (default: the data set's)"
    )
    zero_shot_steps: int = option(
        0,
        "steps between zero-shot evaluations; 0: as often as the val split (--eval_every, --eval_steps)",
        "--imagenet_eval_steps",
        minimum=0,
        also={"-1": "0"},
    )
    retention_dataset: str | None = option(
        None,
        "data set of --dataset's names whose test split (else val) is scored before and after training and with each "
        "evaluation: what the finetune forgets",
        auto="none",
    )
    retention_root: str | None = option(None, "folder of --retention_dataset (default: --dataset_root)")
    retention_weight: float = option(
        0.0,
        "choose best.pt by val rsum + this weight x the retention score: rsum of --retention_dataset, else top-1 of "
        "--zero_shot_eval",
        minimum=0,
    )
    recall_k: tuple[int, ...] = option((1, 5, 10), "the K of recall@K; 1, 5 and 10 are always included", minimum=1)
    protocols: tuple[str, ...] = option(
        ("auto",),
        "further protocols: the mean of folds of 1,000 images, ECCV Caption and CxC (both for COCO's test split, with "
        "eccv-caption installed), R-Precision and mAP@R; auto: the first three for COCO's test split",
        choices=("auto", "none", "coco_1k", "eccv", "cxc", "map_at_r"),
        from_checkpoint=False,
    )
    save_rankings: int | None = option(
        None,
        "also save the first N items of every query with their scores, as Chinese-CLIP's predictions and TREC run and "
        "qrels",
        minimum=1,
        from_checkpoint=False,
    )
    map: bool = option(False, "also compute mean average precision at 1, 5 and 10 (mAP@K)")
    rerank: tuple[str, ...] | None = option(
        None,
        "with --eval: also score with these methods of re-ranking, apart from plain recall; parameters are chosen on "
        "the val split",
        choices=RERANKINGS,
        from_checkpoint=False,
    )
    rerank_bank: int = option(
        10_000, "qb_norm: number of training captions in its bank", minimum=1, from_checkpoint=False
    )
    ensemble: tuple[str, ...] | None = option(
        None,
        "with --eval: checkpoints whose features or scores are averaged with the model's; each has its own "
        "preprocessing and tokenizer",
        from_checkpoint=False,
    )
    ensemble_mode: str = option(
        "scores",
        "mean of the scores, for any models, or of the normalised features, for models finetuned from the same weights",
        choices=("scores", "features"),
        from_checkpoint=False,
    )


@dataclass
class RunOptions:
    """run"""

    eval: bool = option(False, "evaluate instead of finetuning", from_checkpoint=False)
    resume: str | None = option(
        None,
        "checkpoint to resume, or a weight file of another tool to start from; auto: this run's last.pt, if it exists",
        "--ckpt_path",
        from_checkpoint=False,
    )
    reset_optimizer: bool = option(False, "with --resume: reset the optimizer", from_checkpoint=False)
    reset_data_offset: bool = option(False, "with --resume: restart at the first epoch and step", from_checkpoint=False)
    preset: str = option(
        NO_PRESET,
        "default options of a recipe (strong, low_memory, last_layer, keep_zero_shot, siglip2) or of one of the five "
        "systems that this tool unites; --config, a checkpoint and the command line take precedence",
        choices=(NO_PRESET, *PRESETS),
        from_checkpoint=False,
    )
    config: str | None = option(
        None,
        "YAML file of options, e.g. options.json of a run; a checkpoint and the command line take precedence",
        from_checkpoint=False,
    )
    checkpoint_path: str = option(
        "logs", "folder of all runs", "--logs", "--save_model_dir", "-save_model_dir", from_checkpoint=False
    )
    experiments: str = option(
        "ex0", "name of this run, and of its folder in checkpoint_path", "--name", from_checkpoint=False
    )
    overwrite: bool = option(False, "delete the run in this folder and start a new one", from_checkpoint=False)
    save_every: int | None = option(None, "steps between saves of last.pt (default: each epoch)", minimum=1)
    keep_every: int = option(
        0,
        "epochs between numbered checkpoints, which are kept; 0: none",
        "--save_epoch_frequency",
        minimum=0,
        also={"-1": "0"},
    )
    keep_steps: int = option(
        0,
        "steps between numbered checkpoints, which are kept; 0: none",
        "--save_step_frequency",
        minimum=0,
        also={"-1": "0"},
    )
    keep_weights_only: bool = option(
        False, "leave the optimizer out of numbered checkpoints: a third of the size, for evaluation and --pretrained"
    )
    report_training_batch_acc: bool = option(
        True, "log the in-batch accuracy (--no_report_training_batch_acc: skip it)"
    )
    display: int = option(20, "steps between log lines", "--log_every_n_steps", "--log_interval", minimum=1)
    report_to: str = option(
        "tensorboard",
        "trackers that receive the metrics, separated by commas: tensorboard, wandb, trackio (if installed), or none",
    )
    report: bool = option(
        False,
        "also write report.html at the end: metrics, figures, and the retrieved images and captions to look at",
        from_checkpoint=False,
    )
    device: str | None = option(None, "device: cuda, cuda:1, mps or cpu", auto=True, from_checkpoint=False)


PREFIXES = ("train_data", "val_data")  # values may be prefixes of file names
COLUMNS = ("image_column", "caption_column", "split_column", "negative_column")
PLACES = ("dataset_root", "annotations", "image_dir", *COLUMNS, *PREFIXES, "caption_key", "train_num_samples")
"""Options about the files of one data set, which do not apply to another."""

BELONGING = {
    "dataset": (*PLACES, "dataset_weights", "val_fraction", "test_fraction"),
    "retention_dataset": ("retention_root",),
    "zero_shot_eval": ("zero_shot_root", "zero_shot_class_names", "zero_shot_templates", "zero_shot_steps"),
    "optimizer": ("beta1", "beta2", "eps"),
    "trainable": ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    "loss": ("margin",),
    "schedule": ("decay_fraction",),
}
"""Options that belong to the value of another option."""

DETAILS = {
    "augment": ("crop_scale",),
    "hard_negatives": ("hard_negatives_by",),
    "distill_from": ("distill_kind", "distill_weight"),
}
"""Options that have no effect if another one is off (None, "none" or 0)."""

ALTERNATIVES = (("grad_cache", "accum_freq"),)
"""Pairs of options that set the same thing."""

REPEATABLE = [f.name for f in dataclasses.fields(DataOptions) if f.metadata["repeatable"]]

GROUPS = {
    "run": RunOptions,
    "model": ModelOptions,
    "data": DataOptions,
    "loss": LossOptions,
    "train": TrainOptions,
    "evaluation": EvalOptions,
}


@dataclass
class Options:
    """All options of a run, in groups."""

    run: RunOptions = field(default_factory=RunOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    evaluation: EvalOptions = field(default_factory=EvalOptions)
    given: frozenset[str] = frozenset()
    """Names of the options that the user gave, typed or in a config file."""

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Options:
        """Make options from a flat dict. Raises UserError if a value is out of range."""
        options = cls(**{name: _fill(group, values) for name, group in GROUPS.items()})
        for name in GROUPS:
            check_values(getattr(options, name))
        return options

    def flat(self) -> dict[str, Any]:
        """Return all options in one flat dict, as in options.json and in checkpoints."""
        flat = {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(self, group)).items()}
        return flat | ({"dataset": flat["dataset"][0]} if len(flat["dataset"]) == 1 else {})


def _fill(group: type, values: dict[str, Any]) -> Any:
    given = {f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values}
    return group(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def check_values(group: Any) -> None:
    """Raise UserError if a value of `group` is out of range."""
    for f in dataclasses.fields(group):
        meta, value = f.metadata, getattr(group, f.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        for v in values:
            if v == "":
                raise UserError(f"--{f.name} is empty; give it a value or leave it out")
            if isinstance(v, str):
                _check_text(f.name, v)
            if v is not None and meta["choices"] and v not in meta["choices"]:
                raise UserError(f"--{f.name} {v}: choose from {', '.join(meta['choices'])}")
            if v is None or isinstance(v, (str, bool)):
                continue
            if not abs(v) < NUMBER_LIMIT:
                text = v if isinstance(v, float) or v.bit_length() < 1000 else "(hundreds of digits)"
                raise UserError(f"--{f.name} {text}: must be a number of less than 64 bits")
            if meta["below"] is not None and v >= meta["below"]:
                raise UserError(f"--{f.name} {v:g}: must be less than {meta['below']:g}")
            if meta["maximum"] is not None and v > meta["maximum"]:
                raise UserError(f"--{f.name} {v:g}: must be at most {meta['maximum']:g}")
            if meta["minimum"] is not None and v < meta["minimum"]:
                raise UserError(f"--{f.name} {v:g}: must be at least {meta['minimum'] or 0:g}")
            if meta["above"] is not None and v <= meta["above"]:
                raise UserError(f"--{f.name} {v:g}: must be greater than {meta['above']:g}")


def _check_text(name: str, value: str) -> None:
    """Raise UserError if a text has characters that are invalid in file names: a NUL or half a surrogate pair."""
    try:
        valid = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise UserError(f"--{name} {value}: contains a character that is invalid in file names; remove it")


def select_for_resume(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a checkpoint that a new run inherits, without unknown and run-specific ones."""
    fields = {f.name: f for group in GROUPS.values() for f in dataclasses.fields(group)}
    return {name: v for name, v in flat.items() if name in fields and fields[name].metadata["from_checkpoint"]}
