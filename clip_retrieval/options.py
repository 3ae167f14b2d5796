"""Every option of a run.

Each group is a dataclass; the command line is built from them (`command_line`), so an option is declared once.
`run.settings` settles their values. Nothing here imports torch: `--help` stays instant.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clip_retrieval.errors import UserError
from clip_retrieval.losses import LOSSES

AUTO = "auto"
MAX_IMAGE_PIXELS = 500_000_000  # scans and maps pass; takes 2 GB in memory
LARGEST = 2**63  # what a number may be, in size


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
    auto: bool | str = False,
    repeatable: bool = False,
    from_checkpoint: bool = True,
) -> Any:
    """Declare an option as a dataclass field.

    `aliases` are further spellings of the option, with their dashes. `also` maps other spellings of a value to
    the canonical one; `flags` maps flag options to the value they stand for. A number must be at least
    `minimum`, greater than `above` and less than `below`. `auto` admits the word "auto", or the
    word that it is, kept as None. A `repeatable` option that is given several times is a tuple. One with
    `from_checkpoint=False` is never taken from a checkpoint.
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
            "auto": AUTO if auto is True else auto,
            "repeatable": repeatable,
            "from_checkpoint": from_checkpoint,
        },
    )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """What a repeatable option holds, given once or several times."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


@dataclass
class ModelOptions:
    """model"""

    vision_model: str = option(
        "ViT-B/32",
        "the CLIP model: an OpenAI name, an open_clip name, hf-hub:ORG/NAME, local-dir:PATH, a model config .json, or "
        "one of ours: tiny, small, RN50-text6 (clip-training's), resnet18, resnet50, efficientnet (simple-clip's, with "
        "DistilBERT for captions)",
        "--model",
        "--image_encoder_name",
    )
    text_model: str | None = option(
        None,
        "the text tower, where it is named apart: RoBERTa-wwm-ext-base-chinese, RoBERTa-wwm-ext-large-chinese or "
        "RBT3-chinese with Chinese-CLIP's image towers, distilbert-base-uncased with simple-clip's (default: the "
        "model's)",
        "--text_encoder_name",
    )
    tokenizer: str | None = option(
        None,
        "for Hugging Face text towers: a vocab.txt, a local folder or a hub name (default: what the checkpoint "
        "carries, else the model's)",
    )
    pretrained: str | None = option(
        None,
        "weights to start from: a tag of open_clip, or of torchvision for simple-clip's image towers (IMAGENET1K_V1), "
        "`none` for random ones, or a file (default: openai for OpenAI's names, a hub id's own, else none)",
        "--clip_weight_path",
    )
    text_pretrained: str | None = option(
        None,
        "with --text_model, or simple-clip's image towers: weights that the text tower starts from, a BERT's or "
        "DistilBERT's folder, weight file or hub name; the image tower's come from --pretrained (default: none)",
        "--bert_weight_path",
    )
    context_length: int | None = option(None, "length captions are cut to, in tokens (default: the model's)", minimum=3)
    image_size: int | None = option(
        None,
        "side of the square the images are brought to, in pixels; position embeddings are interpolated (default: "
        "the model's)",
        minimum=1,
    )


@dataclass
class DataOptions:
    """data"""

    dataset: tuple[str, ...] = option(
        ("coco",),
        "coco, flickr30k, flickr8k, karpathy, csv, chinese, webdataset, huggingface, shapes (built in, needs no files) "
        "or simple-clip's textcap, sbucaptions, yfcc7m and combined; given several times: a mixture, with "
        "--dataset_root (--annotations, ...: auto for a data set's own) once for each",
        "--dataset_name",
        repeatable=True,
    )
    dataset_weights: tuple[float, ...] | None = option(
        None, "a mixture's parts in an epoch, a weight for each data set (default: all their pairs)", above=0
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
        "chinese: LMDB folder of the train split, or what the names of its _imgs.tsv and _texts.jsonl begin with; "
        "webdataset: its shards ('shards/{00000..01537}.tar'); instead of those in dataset_root",
        auto=True,
        repeatable=True,
    )
    val_data: str | tuple[str | None, ...] | None = option(
        None, "the same for the val split", auto=True, repeatable=True
    )
    no_restval: bool = option(False, "coco: train on the train images only (82,783), without restval (30,504)")
    image_column: str = option("image", "csv: column of the image path; huggingface: of the image")
    caption_column: str = option("caption", "csv and huggingface: column of the caption")
    split_column: str = option(
        "split",
        "csv: column of the split (train, val, test); without it all rows are to train on, and all are "
        "what --eval scores",
    )
    caption_key: str | None = option(
        None, "webdataset: key of the caption, or of a list of them, in the .json (default: the .txt, else `caption`)"
    )
    train_num_samples: int | None = option(
        None, "webdataset: pairs in an epoch (default: all, counted, or as sizes.json has them)", minimum=2
    )
    shuffle_buffer: int = option(
        4096, "webdataset: pairs held in memory, over all processes, to shuffle those of each shard", minimum=0
    )
    caption_sampling: str = option(
        "all",
        "all: every caption once an epoch; one: each image once an epoch with a random caption, of shards that are "
        "streamed always one",
        choices=("all", "one"),
    )
    augment: str = option(
        "none",
        "training images: as in evaluation, a random crop, or a crop changed by AutoAugment",
        choices=("none", "crop", "auto"),
        flags={"--use_augment": "auto"},
    )
    decoder: str = option(
        "pillow",
        "how images are decoded and resized: as the reference does, or 2.5 times faster with pixels that differ by a "
        "grey level or two",
        choices=("pillow", "fast"),
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "pixels of the largest image that is read: a file of a few kilobytes may ask for more memory than there is; an "
        "image takes up to 4 bytes a pixel in each loading process",
        minimum=1,
    )
    image_cache: str | None = option(
        None,
        "folder for the decoded, resized images: later epochs and runs read them at memory speed",
        from_checkpoint=False,
    )
    num_workers: int | None = option(
        None,
        "processes that load images, in each training process",
        minimum=0,
        auto=True,
        from_checkpoint=False,
    )

    def __post_init__(self) -> None:
        self.dataset = as_tuple(self.dataset)

    @property
    def name(self) -> str:
        """Name of the data set, for messages and file names: a mixture is `coco+sbucaptions`."""
        return "+".join(self.dataset)

    @property
    def place(self) -> str:
        """Where the data are, for messages."""
        places = self.annotations or self.train_data or self.val_data or self.dataset_root
        return ", ".join(place for place in as_tuple(places) if place)

    def parts(self) -> list[DataOptions]:
        """The options of each data set of a mixture; of one data set, these.

        Raises UserError where an option was given neither once nor once for each of them.
        """
        names = self.dataset
        if self.dataset_weights and len(self.dataset_weights) != len(names):
            raise UserError(
                f"--dataset_weights has {len(self.dataset_weights)} values, --dataset {len(names)}; give one for each"
            )
        values = {"dataset": [(name,) for name in names]}
        for name in REPEATABLE:
            if name == "dataset":
                continue
            given = as_tuple(getattr(self, name))
            if len(given) == 1 and (given[0] is None or name == "dataset_root" or len(names) == 1):
                given *= len(names)  # a folder that holds them all
            if len(given) != len(names):
                raise UserError(
                    f"--{name} was given {len(given)} time{'s' * (len(given) > 1)}, --dataset {len(names)}: give it "
                    "once for each data set, in their order"
                )
            values[name] = given
        return [
            dataclasses.replace(self, **{name: given[i] for name, given in values.items()}, dataset_weights=None)
            for i in range(len(names))
        ]


@dataclass
class LossOptions:
    """loss"""

    loss: str = option(
        "infonce",
        "contrastive loss",
        choices=tuple(LOSSES),
        also={"cross_entropy": "infonce", "cos_embedd": "margin"},
        flags={"--use_siglip": "siglip"},
    )
    margin: float = option(0.1, "cosine below which a negative pair costs nothing (margin)")


@dataclass
class TrainOptions:
    """training"""

    epochs: int = option(10, "length of the run, in epochs", "--num_epoch", "--num_epochs", "--max_epochs", minimum=1)
    max_steps: int | None = option(None, "length of the run, in steps, instead of --epochs", minimum=1)
    batch_size: int = option(256, "pairs in a step, over all processes", "-b", minimum=2)
    grad_cache: int | None = option(
        None,
        "pairs each process computes at a time, for a batch larger than the memory; same gradients, twice the forward "
        "passes (default: all)",
        minimum=1,
    )
    accum_freq: int = option(1, "the same as --grad_cache, as a number of parts", minimum=1)
    lr: float = option(1e-5, "peak learning rate", "--learning_rate", "-lr", above=0)
    beta1: float = option(0.9, "AdamW's beta1", minimum=0, below=1)
    beta2: float = option(0.98, "AdamW's beta2", minimum=0, below=1)
    eps: float = option(1e-6, "AdamW's epsilon", above=0)
    weight_decay: float = option(
        0.2,
        "AdamW's weight decay; never on biases, norms, scale and position embeddings",
        "--wd",
        "-wd",
        minimum=0,
    )
    warmup: float = option(500, "steps of linear warmup, or a fraction of the run if below 1", minimum=0)
    grad_clip: float | None = option(None, "clip the gradient to this norm (default: not at all)", above=0)
    trainable: str = option(
        "all",
        "what learns: everything, the two projections and the scale, or a small adaptor behind the image tower",
        choices=("all", "linear_projection", "adaptor"),
    )
    freeze_vision: bool = option(False, "keep the image tower as it is")
    freeze_text: bool = option(False, "keep the text tower as it is")
    precision: str = option(
        "auto",
        "training precision; auto is bf16 AMP where the device has it, else fp16 AMP, and fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
        flags={"--fp16_precision": "fp16"},
    )
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    no_feature_cache: bool = option(
        False, "encode frozen towers anew in every epoch, instead of once (the same weights in the end)"
    )
    compile: bool = option(
        False, "compile the towers with torch.compile: minutes at the start, then faster steps", from_checkpoint=False
    )
    seed: int = option(99, "seed of everything random", minimum=0)
    deterministic: bool = option(
        False, "on a GPU: the same run twice gives the same weights, bit for bit, but slower (on a CPU it always does)"
    )


@dataclass
class EvalOptions:
    """evaluation"""

    eval_split: str = option("test", "split that --eval scores", choices=("val", "test"))
    eval_batch_size: int | None = option(
        None,
        "images, or captions, encoded at a time",
        "--valid_batch_size",
        minimum=1,
        auto=True,
        from_checkpoint=False,
    )
    eval_precision: str = option("fp32", "precision of encoding", choices=("fp32", "bf16", "fp16"))
    eval_every: int = option(
        1,
        "epochs between evaluations on the val split; 0: none before the end",
        "--valid_epoch_interval",
        minimum=0,
        also={"-1": "0"},
    )
    eval_steps: int = option(
        0,
        "steps between further evaluations on the val split; 0: none",
        "--valid_step_interval",
        minimum=0,
        also={"-1": "0"},
    )
    no_eval_first: bool = option(False, "do not evaluate the model before its first step")
    zero_shot_eval: str | None = option(
        None,
        "zero-shot accuracy while training: cifar10, cifar100, stl10, imagenet, or a folder with a folder of images "
        "for each class",
        flags={"--imagenet_eval": "imagenet"},
        auto="none",
    )
    zero_shot_root: str | None = option(None, "folder of such a data set (default: --dataset_root)")
    zero_shot_class_names: str | None = option(None, "file of its class names (default: its own)")
    zero_shot_templates: str | None = option(
        None, "its prompts: imagenet, cifar, simple, stl10, chinese, or a file (default: the data set's)"
    )
    zero_shot_steps: int = option(
        0,
        "steps between zero-shot evaluations; 0: whenever the val split is evaluated, or would be",
        "--imagenet_eval_steps",
        minimum=0,
        also={"-1": "0"},
    )
    recall_k: tuple[int, ...] = option((1, 5, 10), "the K of recall@K; 1, 5 and 10 are always there", minimum=1)
    map: bool = option(False, "mean average precision at 1, 5 and 10 (mAP@K) besides recall")


@dataclass
class RunOptions:
    """run"""

    eval: bool = option(False, "evaluate instead of finetuning", from_checkpoint=False)
    resume: str | None = option(
        None,
        "checkpoint to go on from (ours), or weights to start from (others'); auto: this run's last.pt if there is one",
        "--ckpt_path",
        from_checkpoint=False,
    )
    reset_optimizer: bool = option(False, "with --resume: start with a fresh optimizer", from_checkpoint=False)
    reset_data_offset: bool = option(
        False, "with --resume: start again at the first epoch and step", from_checkpoint=False
    )
    config: str | None = option(
        None,
        "YAML file of options, e.g. another run's options.json; a checkpoint's and those that are typed go first",
        from_checkpoint=False,
    )
    checkpoint_path: str = option(
        "logs", "folder of all runs", "--logs", "--save_model_dir", "-save_model_dir", from_checkpoint=False
    )
    experiments: str = option("ex0", "name of this run, a folder in checkpoint_path", "--name", from_checkpoint=False)
    overwrite: bool = option(False, "start afresh in a folder that holds a run", from_checkpoint=False)
    save_every: int | None = option(None, "steps between saves of last.pt (default: each epoch)", minimum=1)
    keep_every: int = option(
        0,
        "epochs between numbered checkpoints that stay; 0: none",
        "--save_epoch_frequency",
        minimum=0,
        also={"-1": "0"},
    )
    keep_steps: int = option(
        0, "steps between numbered checkpoints that stay; 0: none", "--save_step_frequency", minimum=0, also={"-1": "0"}
    )
    report_training_batch_acc: bool = option(True, "log the in-batch accuracy (--no_...: leave it out)")
    display: int = option(20, "steps between log lines", "--log_every_n_steps", "--log_interval", minimum=1)
    device: str | None = option(None, "cuda, mps or cpu, or a numbered one (cuda:1)", auto=True, from_checkpoint=False)


PREFIXES = ("train_data", "val_data")  # they may be the beginning of the names of files
PLACES = ("dataset_root", "annotations", "image_dir", "image_column", "caption_column", "split_column", *PREFIXES)
PLACES += ("caption_key", "train_num_samples")
"""Where and how the files of a data set are read: of no use for another one."""

BELONGING = {
    "dataset": (*PLACES, "dataset_weights"),
    "zero_shot_eval": ("zero_shot_root", "zero_shot_class_names", "zero_shot_templates", "zero_shot_steps"),
}
"""Options that go with what another one names."""

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
    """All options of a run, one small group per concern."""

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
        """Make options from a flat dict. Raises UserError on a value out of its declared range."""
        options = cls(**{name: _fill(group, values) for name, group in GROUPS.items()})
        for name in GROUPS:
            check_values(getattr(options, name))
        return options

    def flat(self) -> dict[str, Any]:
        """Return all options in one dict, as options.json and the checkpoints hold them."""
        flat = {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(self, group)).items()}
        return flat | ({"dataset": flat["dataset"][0]} if len(flat["dataset"]) == 1 else {})


def _fill(group: type, values: dict[str, Any]) -> Any:
    given = {f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values}
    return group(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def check_values(group: Any) -> None:
    """Raise UserError for a value of `group` that is out of its declared range."""
    for f in dataclasses.fields(group):
        meta, value = f.metadata, getattr(group, f.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        for v in values:
            if v == "":
                raise UserError(f"--{f.name} is empty; give it a value or leave it out")
            if isinstance(v, str):
                _check_text(f.name, v)
            if v is None or isinstance(v, (str, bool)):
                continue
            if not abs(v) < LARGEST:
                shown = v if isinstance(v, float) or v.bit_length() < 1000 else "(hundreds of digits)"
                raise UserError(f"--{f.name} {shown}: must be a number of less than 64 bits")
            if meta["below"] is not None and v >= meta["below"]:
                raise UserError(f"--{f.name} {v:g}: must be less than {meta['below']:g}")
            if meta["minimum"] is not None and v < meta["minimum"]:
                raise UserError(f"--{f.name} {v:g}: must be at least {meta['minimum'] or 0:g}")
            if meta["above"] is not None and v <= meta["above"]:
                raise UserError(f"--{f.name} {v:g}: must be greater than {meta['above']:g}")
        if meta["choices"] and value not in meta["choices"]:
            raise UserError(f"--{f.name} {value}: choose from {', '.join(meta['choices'])}")


def _check_text(name: str, value: str) -> None:
    """Raise UserError for a text that can be no name of a file: the system refuses NUL, and half surrogate pairs."""
    try:
        possible = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UserError(f"--{name} {value}: holds a character that no name of a file can have; correct it")


def select_for_resume(flat: dict[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint's options that a new run takes over: unknown and run-bound ones are left out."""
    fields = {f.name: f for group in GROUPS.values() for f in dataclasses.fields(group)}
    return {name: v for name, v in flat.items() if name in fields and fields[name].metadata["from_checkpoint"]}
