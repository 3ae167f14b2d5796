"""Text towers and tokenizers of transformers. Code in a folder or a repository is never run.

transformers runs the Python files that a config names (`auto_map`) if allowed, asks on the terminal by default, and
may fetch kernels that a config names. Here a config keeps only the fields of its model type, and loaders
never run code.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from open_clip.hf_configs import arch_dict

from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular
from clip_retrieval.models import hub
from clip_retrieval.models.libraries import quiet

TEXT_TOWERS = (*arch_dict, "distilbert")
LARGEST_JSON = 2**26
"""Bytes. A tokenizer has a few million, a config a thousand."""


def read_small(path: Path) -> bytes:
    """Read a small regular file. Raises OSError, also if it is larger than LARGEST_JSON."""
    with open_regular(path) as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise OSError(errno.EFBIG, f"it is larger than {LARGEST_JSON:,} bytes", str(path))
    return content


def read_model_json(path: Path, kind: str) -> Any:
    """Read a small JSON file. Raises UserError, naming its `kind`, if it is missing, damaged or too large."""
    try:
        return json.loads(read_small(path).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a {kind}: {describe(error)}") from None


def filter_config(config: Any, source: str) -> dict[str, Any]:
    """Keep only the fields that a text tower's model_type defines: no code, kernels or quantisation.

    Raises UserError, naming `source`, if the model_type is not in TEXT_TOWERS.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    kind: Any = config.get("model_type") if isinstance(config, dict) else None
    if kind not in TEXT_TOWERS:
        raise UserError(f"{source}: unknown model_type {kind!r} of a text tower; known are {', '.join(TEXT_TOWERS)}")
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict().keys() - PretrainedConfig().to_dict().keys()
    known |= {"model_type", "is_encoder_decoder", *config_class.attribute_map}
    return {name: value for name, value in config.items() if name in known}


def load_tokenizer(load: Callable[..., Any], source: str, failure: str, **arguments: Any) -> Any:
    """Load a tokenizer from a folder or the hub without running code.

    Args:
        load: AutoTokenizer.from_pretrained of transformers, or HFTokenizer of open_clip.
        source: a folder or a hub name.
        failure: message if the hub name cannot be fetched.
        arguments: more arguments of `load`.

    Raises UserError if it cannot be fetched or read, or needs its own code.
    """
    _refuse_special_files(Path(source))
    is_local = Path(source).exists()
    try:
        with quiet() if is_local else hub.hub_access():
            return load(source, trust_remote_code=False, local_files_only=is_local, **arguments)
    except Exception as error:  # transformers raises nearly anything on broken files
        if isinstance(error, ImportError) or _lacks_sentencepiece(Path(source), error):
            raise UserError(
                f"the tokenizer {source} needs a further package; pip install sentencepiece protobuf"
            ) from error
        if "custom code" in str(error):
            raise UserError(
                f"the tokenizer {source} needs its own Python code (auto_map), which is never run; give a tokenizer "
                "class of transformers itself as --tokenizer"
            ) from error
        if is_local:
            failure = f"the tokenizer {source} cannot be read ({describe(error)}); give another --tokenizer"
        raise UserError(failure) from error


def _lacks_sentencepiece(source: Path, error: Exception) -> bool:
    """Whether a tokenizer could not be loaded because it is a SentencePiece model, and that package is missing.

    transformers 5 then asks for tiktoken, or does not know the tokenizer's class.
    """
    if find_spec("sentencepiece") is not None:
        return False
    only_model = any(source.glob("*.model")) and not (source / "tokenizer.json").exists()
    return only_model or any(package in str(error) for package in ("sentencepiece", "tiktoken"))


def _refuse_special_files(path: Path) -> None:
    """Raise UserError for a FIFO or a device, or a folder with one: reading it might never end."""
    inside = [*path.iterdir(), *path.glob("*/*")] if path.is_dir() else [path]
    for file in inside:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"{file} is not a regular file; delete it, or give another --tokenizer")
