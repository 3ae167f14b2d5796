"""Text towers and tokenizers of transformers, without their code: what a folder or a repository holds is never run.

transformers runs the Python files that a config names (`auto_map`) if it is told to, asks on the terminal if it is told
nothing, and may fetch kernels for a config that asks for them. Here a config is reduced to the sizes that its kind
has, and everything else is told not to.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from open_clip.hf_configs import arch_dict
from open_clip.tokenizer import HFTokenizer

from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular
from clip_retrieval.models import hub

TEXT_TOWERS = (*arch_dict, "distilbert")
LARGEST_JSON = 2**26
"""Bytes; a tokenizer's words take a few million, a config a thousand."""


def read_small(path: Path) -> bytes:
    """The bytes of a small regular file. Raises OSError, also if it is larger than LARGEST_JSON."""
    with open_regular(path) as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise OSError(errno.EFBIG, f"it is larger than {LARGEST_JSON:,} bytes", str(path))
    return content


def read_model_json(path: Path, what: str) -> Any:
    """The content of a small JSON file. Raises UserError, calling it `what`, if it is missing, damaged or too large."""
    try:
        return json.loads(read_small(path).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a {what}: {describe(error)}") from None


def fetch_config(name: str) -> dict[str, Any]:
    """config.json of a text tower, in a folder or on the hub. Raises OSError, ValueError or UserError without one."""
    path = Path(name) / "config.json"
    if not Path(name).is_dir():
        path = Path(huggingface_hub.hf_hub_download(name, "config.json"))
    return known_config(read_model_json(path, "config of a text tower"), str(path))


def known_config(config: Any, source: str) -> dict[str, Any]:
    """The part of a text tower's config that its kind of tower has: no code, kernels or quantisation.

    Raises UserError, naming `source`, for another kind than TEXT_TOWERS.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in TEXT_TOWERS:
        raise UserError(f"{source}: a text tower of the kind {kind!r} is unknown; known are {', '.join(TEXT_TOWERS)}")
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict().keys() - PretrainedConfig().to_dict().keys()
    known |= {"model_type", "is_encoder_decoder", *config_class.attribute_map}
    return {name: value for name, value in config.items() if name in known}


def refuse_special_files(source: str) -> None:
    """Raise UserError if `source` is a FIFO or a device, or a folder that holds one: reading it might never end."""
    path = Path(source)
    inside = [*path.iterdir(), *path.glob("*/*")] if path.is_dir() else [path]
    for file in inside:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"{file} is not a regular file; take it away, or give another --tokenizer")


def load_tokenizer(source: str) -> Any:
    """transformers' tokenizer of a folder or a hub name, without running code.

    Raises UserError for a folder that holds none, and one of hub.FETCH_ERRORS for a name that cannot be fetched.
    """
    from transformers import AutoTokenizer

    is_here = Path(source).exists()
    with _tokenizer_errors(source), hub.quiet() if is_here else hub.hub_access():
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=is_here)


def load_open_clip_tokenizer(source: str, context_length: int, **arguments: Any) -> HFTokenizer:
    """The same as open_clip wraps it; `arguments` are those of `checkpoint_schema.TOKENIZER_ARGUMENTS`."""
    is_here = Path(source).exists()
    with _tokenizer_errors(source), hub.quiet() if is_here else hub.hub_access():
        return HFTokenizer(source, context_length, trust_remote_code=False, local_files_only=is_here, **arguments)


@contextmanager
def _tokenizer_errors(source: str) -> Iterator[None]:
    """A block that loads a tokenizer; transformers and its libraries raise nearly anything on broken files."""
    _refuse_special_files(Path(source))
    try:
        yield
    except Exception as error:
        if "custom code" in str(error):
            names = [Path(source) / name for name in ("tokenizer_config.json", "config.json")]
            place = next((path for path in names if _names_code(path)), source)
            raise UserError(
                f"{place} asks to run Python code of its own (auto_map), which is never run; give a tokenizer of one "
                "of transformers' own kinds as --tokenizer"
            ) from error
        if Path(source).exists():
            raise UserError(
                f"the tokenizer {source} cannot be read ({describe(error)}); give another --tokenizer"
            ) from error
        raise OSError(describe(error)) from error


def _refuse_special_files(path: Path) -> None:
    """Raise UserError for a FIFO or a device, or a folder that holds one: reading it might never end."""
    inside = [*path.iterdir(), *path.glob("*/*")] if path.is_dir() else [path]
    for file in inside:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"{file} is not a regular file; take it away, or give another --tokenizer")


def _names_code(path: Path) -> bool:
    try:
        return "auto_map" in read_model_json(path, "config")
    except (UserError, TypeError):
        return False
