"""Options from a file: --config run.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from clip_retrieval.command_line import OneOrMore, OptionParser, build_parser
from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular

# What options.json holds beside options, and the file that its run read, whose options are all in it.
RECORDED = ("versions", "device_used", "config")
NOTHING = ("null", "~", "")
LARGEST = 2**18  # bytes of a config file: YAML takes seconds for them
TRUE = ("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON")  # YAML's, of version 1.1 as well
FALSE = ("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF")


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
    content = _read_mapping(Path(path))
    recorded = RECORDED if "versions" in content else ()
    spelled: dict[str, str] = {}
    for key, value in content.items():
        if key not in recorded and value not in NOTHING:
            option, words = _typed(parser, key, value)
            if spelled.setdefault(option, key) != key:
                parser.error(f"{spelled[option]} and {key} are the same option; keep one of them")
            arguments += words
    return vars(parser.parse_args(arguments))


class _ConfigParser(OptionParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        with open_regular(path) as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"--config {path}: more than {LARGEST:,} bytes; give a YAML file of options")
        content = _parsed(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({describe(error)}); give a YAML file") from None
    except RecursionError:
        raise UserError(f"--config {path}: no YAML (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"--config {path}: no YAML ({error})") from None
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: not a YAML file of `option: value` lines")
    return content


def _parsed(text: str) -> Any:
    """The content of YAML, every value as it is written: that 010 is no 8, and 1.10 no 1.1.

    Raises ValueError, with the line, if it is no YAML, a key is no text, or a key is given twice.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
            keys: set[str] = set()
            for key, _ in node.value:
                line = f"line {key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode):
                    raise ValueError(f"{line}: a key is a {key.id}, not the name of an option")
                if key.value in keys:
                    raise ValueError(f"{line}: {key.value} is given twice")
                keys.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a BaseLoader makes texts, lists and dicts, and nothing else
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{getattr(error, 'problem', None) or ' '.join(str(error).split())}") from None


def _typed(parser: OptionParser, key: str, value: Any) -> tuple[str, list[str]]:
    """The option's own name, and what would be typed for `key: value`."""
    name = f"--{key.lstrip('-').replace('-', '_')}"
    action = parser.action(name)
    if action is None or action.dest in ("help", "version", "config"):
        parser.error(f"unknown option {key}{parser.nearest(name)}")
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, (dict, list)) for v in values):
        parser.error(f"{key} holds no value; options stand side by side")
    if action.nargs == 0:
        if value not in TRUE + FALSE:
            parser.error(f"{key}: {value!r} is not true or false")
        inverse = f"--{name[5:]}" if name.startswith("--no_") else f"--no_{name[2:]}"
        return action.dest, [name] if value in TRUE else [inverse] if parser.action(inverse) else []
    words = ["auto" if v in NOTHING else str(v) for v in values]
    if action.nargs:
        return action.dest, [name, *words]
    if len(words) > 1 and not isinstance(action, OneOrMore):
        parser.error(f"{key} takes one value")
    return action.dest, [f"{name}={word}" for word in words]
