"""Options from a file: --config run.yaml, or one of the files of --preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from clip_retrieval.command_line import OneOrMore, OptionParser, build_parser
from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular
from clip_retrieval.options import AUTO, NO_PRESET, PRESETS

# Keys of options.json that are skipped: no options, or the files whose options it contains already.
RECORDED_KEYS = ("versions", "device_used", "git_commit", "command_line", "config", "preset")
WEIGHTS = ("pretrained", "text_pretrained")
NULLS = ("null", "~", "")
MAX_BYTES = 2**18  # bytes; YAML takes seconds to parse that many
TRUE = ("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON")  # YAML 1.1 and 1.2
FALSE = ("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF")


def read_config(path: str | Path | None) -> dict[str, Any]:
    """Read the options of a YAML file into a flat dict, like that of the command line. No file: an empty dict.

    The keys are the options of main.py in any of their spellings. A flag is true or false; null skips the option. A
    run's options.json is a valid config file. Raises UserError, naming file and key, if a key is unknown or its value
    is invalid for the option.
    """
    if path is None:
        return {}
    parser = build_parser("", prog=f"--config {path}", parser_class=_ConfigParser)
    arguments: list[str] = []
    content = _read_mapping(Path(path))
    skipped = RECORDED_KEYS if "versions" in content else ()
    spelled: dict[str, str] = {}
    for key, value in content.items():
        if key not in skipped and value not in NULLS:
            option, words = _to_arguments(parser, key, value)
            if spelled.setdefault(option, key) != key:
                parser.error(f"{spelled[option]} and {key} are the same option; give one of them")
            arguments += words
    return vars(parser.parse_args(arguments))


def read_preset(config: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Read the options of the preset that is typed or that --config names; empty if there is none.

    If the user gives weights, they replace all weights of the preset.
    """
    name = typed.get("preset", config.get("preset", NO_PRESET))
    if name == NO_PRESET:
        return {}
    preset = read_config(PRESETS[name])
    layers = (config, typed)
    has_weights = any("pretrained" in layer or layer.get("resume", AUTO) != AUTO for layer in layers)
    return {key: value for key, value in preset.items() if not (has_weights and key in WEIGHTS)}


class _ConfigParser(OptionParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        with open_regular(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"--config {path}: more than {MAX_BYTES:,} bytes; give a YAML file of options")
        content = _parse_yaml(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({describe(error)}); give a YAML file") from None
    except RecursionError:
        raise UserError(f"--config {path}: not valid YAML (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"--config {path}: not valid YAML ({error})") from None
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: not a YAML file of `option: value` lines")
    return content


def _parse_yaml(text: str) -> Any:
    """Parse YAML and keep every value as text: 010 stays 010, not 8, and 1.10 does not become 1.1.

    Raises ValueError, with the line, if it is not valid YAML, or if a key is not a text or a duplicate.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
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
        return yaml.load(text, Loader)  # a BaseLoader makes only texts, lists and dicts
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        prefix = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{prefix}{getattr(error, 'problem', None) or ' '.join(str(error).split())}") from None


def _to_arguments(parser: OptionParser, key: str, value: Any) -> tuple[str, list[str]]:
    """Return the option's canonical name, and the command-line arguments for `key: value`."""
    name = f"--{key.lstrip('-').replace('-', '_')}"
    action = parser.action(name)
    if action is None or action.dest in ("help", "version", "config"):
        parser.error(f"unknown option {key}{parser.suggest(name)}")
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, (dict, list)) for v in values):
        parser.error(f"{key}: empty or nested value; give one line for each option")
    if action.nargs == 0:
        if value not in TRUE + FALSE:
            parser.error(f"{key}: {value!r} is not true or false")
        inverse = f"--{name[5:]}" if name.startswith("--no_") else f"--no_{name[2:]}"
        return action.dest, [name] if value in TRUE else [inverse] if parser.action(inverse) else []
    words = ["auto" if v in NULLS else str(v) for v in values]
    if action.nargs:
        return action.dest, [name, *words]
    if len(words) > 1 and not isinstance(action, OneOrMore):
        parser.error(f"{key} takes one value")
    return action.dest, [f"{name}={word}" for word in words]
