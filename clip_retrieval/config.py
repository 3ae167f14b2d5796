"""Options from a file: --config run.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from clip_retrieval.command_line import OneOrMore, OptionParser, build_parser
from clip_retrieval.errors import UserError

# What options.json holds beside options, and the file that its run read, whose options are all in it.
RECORDED = ("versions", "device_used", "config")


def read_config(path: str | Path | None) -> dict[str, Any]:
    """The options in a YAML file, as a flat dict like that of what was typed; of no file, none.

    Its keys are the options of main.py in any of their spellings, a flag's value is true or false, and null leaves an
    option as it is. A run's options.json is such a file. Raises UserError, naming file and key, where one is unknown or
    its value is not what the option takes.
    """
    if path is None:
        return {}
    parser = build_parser("", prog=f"--config {path}", parser_class=_ConfigParser)
    arguments: list[str] = []
    for key, value in _read_mapping(Path(path)).items():
        if value is not None and key not in RECORDED:
            arguments += _typed(parser, str(key), value)
    return vars(parser.parse_args(arguments))


class _ConfigParser(OptionParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def _read_mapping(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}{where}: no YAML ({getattr(error, 'problem', None) or error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: not a YAML file of `option: value` lines")
    return content


def _typed(parser: OptionParser, key: str, value: Any) -> list[str]:
    """What would be typed for `key: value`."""
    name = f"--{key.replace('-', '_')}"
    action = parser.action(name)
    if action is None:
        parser.error(f"unknown option {key}{parser.nearest(name)}")
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, (dict, list)) for v in values):
        parser.error(f"{key} holds a section; options stand side by side")
    if action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"{key}: {value!r} is not true or false")
        inverse = f"--{key[3:]}" if key.startswith("no_") else f"--no_{name[2:]}"
        return [name] if value else [inverse] if parser.action(inverse) else []
    words = ["auto" if v is None else str(v) for v in values]
    if action.nargs:
        return [name, *words]
    if len(words) > 1 and not isinstance(action, OneOrMore):
        parser.error(f"{key} takes one value")
    return [f"{name}={word}" for word in words]
