"""The command line: an argparse parser built from the option groups."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clip_retrieval import __version__
from clip_retrieval.errors import UserError, one_line, reports_error
from clip_retrieval.options import GROUPS, DataOptions, EvalOptions, RunOptions, as_tuple


class OptionParser(argparse.ArgumentParser):
    """Accepts hyphens for underscores in option names. An error is one line, with the nearest option."""

    def parse_args(self, args=None, namespace=None):
        typed = [self._normalize(arg) for arg in (sys.argv[1:] if args is None else args)]
        namespace, unknown = self.parse_known_intermixed_args(typed, namespace)  # options between positionals too
        if unknown:
            self.error(f"unknown option {unknown[0]}{self.suggest(unknown[0].split('=')[0])}")
        return namespace

    def action(self, name: str) -> argparse.Action | None:
        """Return the action of an option, by any of its spellings, or None."""
        return self._option_string_actions.get(name)

    def suggest(self, name: str) -> str:
        """Return `; did you mean --lr?` for a message, or an empty text if no option is similar."""
        matches = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.7)
        return f"; did you mean {matches[0]}?" if matches else ""

    def _normalize(self, arg: str) -> str:
        if not arg.startswith("-"):
            return arg
        name, equals, value = arg.partition("=")
        dashes = name[: len(name) - len(name.lstrip("-"))]
        normalized = dashes + name.lstrip("-").replace("-", "_")
        return normalized + equals + value if normalized in self._option_string_actions else arg

    def error(self, message: str) -> NoReturn:
        text = f"{self.prog}: error: {one_line(message)} (--help lists the options)\n"
        self.exit(2, text if reports_error(text) else None)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Format all spellings, then their value once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"


def build_parser(
    description: str,
    groups: Sequence[type] = tuple(GROUPS.values()),
    prog: str | None = None,
    parser_class: type[OptionParser] = OptionParser,
) -> OptionParser:
    """Build a parser for the options of `groups`. Its namespace holds only the options that were typed."""
    parser = parser_class(
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"clip_retrieval {__version__}", help="show the version")
    for group in groups:
        add_arguments(parser.add_argument_group(f"{group.__doc__} options"), group)
    return parser


def add_arguments(parser: argparse._ActionsContainer, group: type, only: Sequence[str] = ()) -> None:
    """Add one argument for each field of the dataclass `group`, or only for those named in `only`."""
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
            nargs="+" if _is_list(hints[f.name]) and not f.metadata["repeatable"] else None,
            action=OneOrMore if f.metadata["repeatable"] else "store",
            metavar={int: "N", float: "X", str: "TEXT"}[_item_type(hints[f.name])],
        )
        for flag, value in f.metadata["flags"].items():
            parser.add_argument(
                flag, dest=f.name, action="store_const", const=value, help=f"the same as --{f.name} {value}"
            )


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options with which a script evaluates models on data of its own."""
    add_arguments(parser, RunOptions, only=("resume", "checkpoint_path", "device"))
    add_arguments(parser, EvalOptions, only=("eval_batch_size", "eval_precision", "ensemble", "ensemble_mode"))
    add_arguments(parser, DataOptions, only=("caption_prefix", "num_workers", "decoder", "max_image_pixels"))


def _help(f: dataclasses.Field) -> str:
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += f" ({', '.join(f.metadata['choices'])})"
    if f.metadata["auto"]:
        text += "" if f.metadata["repeatable"] else f" (default: {f.metadata['auto']})"
    elif f.default is not None:
        default = f.default
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    return text.replace("%", "%%")


class OneOrMore(argparse.Action):
    """Stores the value of an option that is given once, and a tuple for one that is given several times."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = as_tuple(getattr(namespace, self.dest)) if hasattr(namespace, self.dest) else ()
        setattr(namespace, self.dest, (*before, values) if before else values)


def _is_list(hint: Any) -> bool:
    """Whether an option takes several values at once: `tuple[int, ...]` or `tuple[int, ...] | None`."""
    return typing.get_origin(hint if not isinstance(hint, types.UnionType) else typing.get_args(hint)[0]) is tuple


def _item_type(hint: Any) -> type:
    """Return int for `int`, `int | None`, `tuple[int, ...]` and `tuple[int, ...] | None`."""
    while isinstance(hint, types.UnionType) or typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint


def _value_type(hint: type, meta: typing.Mapping[str, Any]):
    """Return the function that converts a typed string to the option's value."""

    def convert(text: str) -> Any:
        text = meta["also"].get(text, text)
        if meta["auto"] and text == meta["auto"]:
            return None
        if meta["choices"] and text not in meta["choices"]:
            matches = difflib.get_close_matches(text, [*meta["choices"], *meta["also"]], n=1)
            suggestion = f"; did you mean {matches[0]}?" if matches else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(meta['choices'])}{suggestion}")
        try:
            return hint(text)
        except ValueError:
            kind = {"int": "a whole number", "float": "a number"}[hint.__name__]
            kind += f" or {meta['auto']}" if meta["auto"] else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None

    return convert


def parse(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line of main.py into a flat dict of the options that were typed."""
    parser = build_parser(
        "Finetune CLIP for image-text retrieval, or evaluate it (--eval).",
        prog="main.py",
    )
    return vars(parser.parse_args(argv))


def split_names(text: str) -> list[str]:
    """Split comma-separated names, each once."""
    return list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))


def take_values(group: argparse._ArgumentGroup, typed: dict[str, Any], paths: Collection[str] = ()) -> dict[str, Any]:
    """Remove the values of a group's options from `typed` and return them.

    Options named in `paths` become a Path, repeated options a tuple. Raises UserError if a value is empty: as a Path it
    would be the working directory.
    """
    own = {action.dest: typed.pop(action.dest) for action in group._group_actions if action.dest in typed}
    for name, value in own.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise UserError(f"--{name} is empty; give it a value or leave it out")
        if isinstance(value, list):
            own[name] = tuple(value)
        elif name in paths:
            own[name] = Path(value)
    return own
