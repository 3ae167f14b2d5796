"""Every option of a run.

Each group is a dataclass; the command line is built from them, so an option is declared once. A value is
settled from four layers: built-in defaults, then a checkpoint's options, then what was typed
(`Options.settle`). Nothing here imports torch: `--help` stays instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from clip_retrieval.errors import UserError

AUTO = "auto"
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
    auto: bool = False,
    from_checkpoint: bool = True,
) -> Any:
    """Declare an option as a dataclass field.

    `aliases` are further spellings of the option, with their dashes. `also` maps other spellings of a value to
    the canonical one; `flags` maps flag options to the value they stand for. A number must be at least
    `minimum`, greater than `above` and less than `below`. `auto` admits the word "auto", kept as None. An option with
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
            "auto": auto,
            "from_checkpoint": from_checkpoint,
        },
    )


@dataclass
class ModelOptions:
    """model"""

    vision_model: str = option(
        "ViT-B/32",
        "the CLIP model: an OpenAI name, an open_clip name, hf-hub:ORG/NAME, local-dir:PATH, a model config "
        ".json, or `tiny`",
        "--model",
        "--image_encoder_name",
    )
    text_model: str | None = option(
        None, "the text tower, where it is named apart (default: the model's)", "--text_encoder_name"
    )
    tokenizer: str | None = option(
        None, "for Hugging Face text towers: a vocab.txt, a local folder or a hub name (default: the model's)"
    )
    pretrained: str | None = option(
        None,
        "weights to start from: an open_clip tag, `none` for random ones, or a file (default: openai for OpenAI's "
        "names, a hub id's own, else none)",
        "--clip_weight_path",
    )
    text_pretrained: str | None = option(
        None,
        "with --text_model: weights that the text tower starts from, a BERT's folder, weight file or hub name; the "
        "image tower's come from --pretrained (default: none)",
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

    dataset: str = option(
        "coco",
        "coco, flickr30k, flickr8k, karpathy, csv, chinese, or shapes (built in, needs no files)",
        "--dataset_name",
    )
    dataset_root: str = option("datasets", "folder of the data set", "--dataset_path")
    annotations: str | None = option(
        None,
        "captions file instead of the one in dataset_root (coco, karpathy, csv)",
        "--train_annotation_file",
    )
    image_dir: str | None = option(
        None,
        "folder of the images instead of the one in dataset_root (coco, karpathy, csv)",
        "--train_img_dir",
    )
    train_data: str | None = option(
        None,
        "chinese: LMDB folder of the train split, or what the names of its _imgs.tsv and _texts.jsonl begin with, "
        "instead of those in dataset_root",
    )
    val_data: str | None = option(None, "chinese: the same for the val split")
    no_restval: bool = option(False, "coco: train on the train images only (82,783), without restval (30,504)")
    image_column: str = option("image", "csv: column of the image path")
    caption_column: str = option("caption", "csv: column of the caption")
    split_column: str = option(
        "split",
        "csv: column of the split (train, val, test); without it all rows are to train on, and all are "
        "what --eval scores",
    )
    caption_sampling: str = option(
        "all",
        "all: every caption once an epoch; one: each image once an epoch with a random caption",
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

    @property
    def place(self) -> str:
        """Where the data are, for messages."""
        return self.annotations or self.train_data or self.val_data or self.dataset_root


@dataclass
class LossOptions:
    """loss"""

    loss: str = option(
        "infonce",
        "contrastive loss",
        choices=("infonce", "siglip", "margin"),
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
    imagenet_eval: bool = option(False, "zero-shot ImageNet accuracy during training (not in this version: refused)")
    imagenet_eval_steps: int | None = option(None, "steps between those (not in this version: refused)", minimum=1)
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

    def flat(self) -> dict[str, Any]:
        """All options in one dict, as options.json and the checkpoints hold them."""
        return {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(self, group)).items()}

    @classmethod
    def settle(cls, *layers: dict[str, Any], complete: bool = True) -> Options:
        """Options from layers of flat dicts; a later layer decides.

        Raises UserError on a bad value and, where the layers are `complete`, on options that exclude each other.
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            if layer.get("train_data") or layer.get("val_data"):
                merged["dataset"] = "chinese"  # the only one that has them, so that it need not be typed
            merged.update(layer)
        options = cls(**{name: _fill(group, merged) for name, group in GROUPS.items()})
        for name in GROUPS:
            check_values(getattr(options, name))
        if complete:
            options.check_combinations()
        return options

    def check_combinations(self) -> None:
        """Raise UserError for options that exclude each other."""
        train, data = self.train, self.data
        for name in ("train_data", "val_data"):
            if getattr(data, name) and data.dataset != "chinese":
                raise UserError(f"--{name} is for --dataset chinese; drop it, or --dataset {data.dataset}")
        if train.grad_cache and train.accum_freq > 1:
            raise UserError("--grad_cache and --accum_freq say the same in two ways; drop one of them")
        if train.freeze_vision and train.freeze_text and train.trainable != "adaptor":
            raise UserError("--freeze_vision and --freeze_text together leave nothing to train; drop one of them")
        if self.evaluation.imagenet_eval or self.evaluation.imagenet_eval_steps:
            raise UserError("--imagenet_eval: zero-shot classification is not in this version; leave the option out")
        if self.run.overwrite and self.run.resume == AUTO:
            raise UserError("--overwrite and --resume auto contradict each other; drop one of them")


def _fill(group: type, values: dict[str, Any]) -> Any:
    return group(**{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values})


def check_values(group: Any) -> None:
    """Raise UserError for a value of `group` that is out of its declared range."""
    for f in dataclasses.fields(group):
        meta, value = f.metadata, getattr(group, f.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        for v in values:
            if v == "":
                raise UserError(f"--{f.name} is empty; give it a value or leave it out")
            if v is None or isinstance(v, (str, bool)):
                continue
            if not abs(v) < LARGEST:
                raise UserError(f"--{f.name} {v}: no usable number")
            if meta["below"] is not None and v >= meta["below"]:
                raise UserError(f"--{f.name} {v:g}: must be less than {meta['below']:g}")
            if meta["minimum"] is not None and v < meta["minimum"]:
                raise UserError(f"--{f.name} {v:g}: must be at least {meta['minimum'] or 0:g}")
            if meta["above"] is not None and v <= meta["above"]:
                raise UserError(f"--{f.name} {v:g}: must be greater than {meta['above']:g}")
        if meta["choices"] and value not in meta["choices"]:
            raise UserError(f"--{f.name} {value}: choose from {', '.join(meta['choices'])}")


def taken_from_checkpoint(flat: dict[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint's options that a new run takes over: unknown and run-bound ones are left out."""
    fields = {f.name: f for group in GROUPS.values() for f in dataclasses.fields(group)}
    return {name: v for name, v in flat.items() if name in fields and fields[name].metadata["from_checkpoint"]}


class _Parser(argparse.ArgumentParser):
    """Takes hyphens for underscores in option names; an error is one line, with the nearest option."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        typed = [self._underscored(arg) for arg in (sys.argv[1:] if args is None else args)]
        namespace, unknown = self.parse_known_args(typed, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1, cutoff=0.7)
            self.error(f"unknown option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return namespace

    def _underscored(self, arg: str) -> str:
        if not arg.startswith("-"):
            return arg
        name, equals, value = arg.partition("=")
        dashes = name[: len(name) - len(name.lstrip("-"))]
        spelled = dashes + name.lstrip("-").replace("-", "_")
        return spelled + equals + value if spelled in self._option_string_actions else arg

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """All spellings, then what they take, once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"


def build_parser(description: str, groups: Sequence[type] = tuple(GROUPS.values()), prog: str | None = None):
    """A parser for the options of `groups`. The namespace it returns holds only what was typed."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for group in groups:
        add_arguments(parser.add_argument_group(f"{group.__doc__} options"), group)
    return parser


def add_arguments(parser: argparse._ActionsContainer, group: type, only: Sequence[str] = ()) -> None:
    """Add one argument per field of the dataclass `group`, or for some of them only."""
    hints = typing.get_type_hints(group)
    for f in dataclasses.fields(group):
        if only and f.name not in only:
            continue
        names = [f"--{f.name}", *f.metadata["aliases"]]
        if hints[f.name] is bool:
            parser.add_argument(*names, dest=f.name, action="store_true", help=f.metadata["help"])
            inverse = f.name[3:] if f.name.startswith("no_") else f"no_{f.name}"
            parser.add_argument(f"--{inverse}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
            continue
        parser.add_argument(
            *names,
            dest=f.name,
            help=_help(f),
            type=_value_type(_item_type(hints[f.name]), f.metadata),
            nargs="+" if typing.get_origin(hints[f.name]) is tuple else None,
            metavar={int: "N", float: "X", str: "TEXT"}[_item_type(hints[f.name])],
        )
        for flag, value in f.metadata["flags"].items():
            parser.add_argument(
                flag, dest=f.name, action="store_const", const=value, help=f"the same as --{f.name} {value}"
            )


def _help(f: dataclasses.Field) -> str:
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += f" ({', '.join(f.metadata['choices'])})"
    if f.metadata["auto"]:
        text += " (default: auto)"
    elif f.default is not None:
        default = f.default
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    return text.replace("%", "%%")


def _item_type(hint: Any) -> type:
    """int of `int`, `int | None` and `tuple[int, ...]`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    return hint


def _value_type(hint: type, meta: typing.Mapping[str, Any]):
    """The function that turns a typed string into the option's value."""

    def convert(text: str) -> Any:
        text = meta["also"].get(text, text)
        if meta["auto"] and text == AUTO:
            return None
        if meta["choices"] and text not in meta["choices"]:
            near = difflib.get_close_matches(text, [*meta["choices"], *meta["also"]], n=1)
            hint_text = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(meta['choices'])}{hint_text}")
        try:
            return hint(text)
        except ValueError:
            kind = {"int": "a whole number", "float": "a number"}[hint.__name__]
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}" + (" or auto" * meta["auto"])) from None

    return convert


def parse(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What was typed on the command line of main.py, as a flat dict."""
    parser = build_parser(
        "Finetune CLIP for image-text retrieval, or evaluate it (--eval).",
        prog="main.py",
    )
    return vars(parser.parse_args(argv))
