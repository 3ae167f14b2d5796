"""The tokenizers of all models: open_clip's, those of transformers, and BERT's WordPiece."""

from __future__ import annotations

import copy
import functools
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from clip_retrieval.data.captions import Tokenizer
from clip_retrieval.errors import UserError
from clip_retrieval.models import names
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.families import find_family
from clip_retrieval.models.hugging_face import load_tokenizer
from clip_retrieval.models.instantiate import DEFAULT_CONTEXT_LENGTH
from clip_retrieval.models.libraries import quiet, translate_errors
from clip_retrieval.models.model_config import ClipModule
from clip_retrieval.models.projection import text_part
from clip_retrieval.models.word_piece import WordPieceTokenizer
from clip_retrieval.options import ModelOptions

WORD_FILES = ("vocab.txt", "tokenizer.json")


def build_tokenizer(options: ModelOptions, model: BuiltModel) -> Tokenizer:
    """Build the tokenizer of `model`; `data.captions.tokenize` runs it.

    The vocabulary of a WordPiece tokenizer is --tokenizer's, else the one in the model's config, else the one beside
    the weights of --text_pretrained, else the hub's. Raises UserError if it cannot be fetched or read, or has more
    tokens than the text tower.
    """
    text = model.config["text_cfg"]
    length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    known = text_part(model.clip).vocab_size
    arguments = {name: value for name, value in (text.get("tokenizer_kwargs") or {}).items() if value is not None}
    family = find_family(model.config)
    # a family's own
    if family.tokenizer:
        words = options.tokenizer or text.get("vocab") or _find_word_folder(options.text_pretrained)
        words = words or _find_word_folder(model.name.removeprefix(names.FOLDER))
        words = words or text.get("hf_tokenizer_name") or next(iter(family.towers.text_models))
        return family.tokenizer(words, length, known, model.config_from)
    # a Hugging Face tokenizer, or CLIP's
    if text.get("hf_tokenizer_name"):
        arguments |= {"context_length": length, "tokenizer_mode": text.get("tokenizer_mode")}
        tokenizer = _load_hugging_face(options, model, arguments)
        size = len(tokenizer.tokenizer)
    elif options.tokenizer:
        raise UserError(f"--tokenizer {options.tokenizer}: {model.name} has CLIP's own tokenizer; drop --tokenizer")
    else:
        with translate_errors(f"{model.config_from}: its tokenizer_kwargs do not fit CLIP's tokenizer", "drop them"):
            tokenizer = SimpleTokenizer(context_length=length, **arguments) if arguments else _clip_tokenizer(length)
        size = tokenizer.vocab_size
    # its ids must fit the text tower
    if size > known:
        raise UserError(
            f"{model.config_from}: the tokenizer has {size:,} tokens, the text tower {known:,}; give the tokenizer of "
            "the model"
        )
    _try_tokenizer(tokenizer, model.config_from, known)
    return tokenizer


_read_clip_tokenizer = functools.cache(SimpleTokenizer)
"""Read CLIP's 49,000 merges once for all models of a process; it takes a quarter of a second."""


def _clip_tokenizer(length: int) -> SimpleTokenizer:
    tokenizer = copy.copy(_read_clip_tokenizer())
    tokenizer.context_length = length
    return tokenizer


def _load_hugging_face(options: ModelOptions, model: BuiltModel, arguments: dict[str, Any]) -> Any:
    """Load --tokenizer, or the tokenizer in the model's config, or that of its folder or hub name."""
    text = model.config["text_cfg"]
    source = options.tokenizer or text["hf_tokenizer_name"]
    with ExitStack() as stack:
        if not options.tokenizer and text.get("tokenizer_files"):
            source = stack.enter_context(tempfile.TemporaryDirectory())
            with translate_errors(f"{model.config_from}: its tokenizer_files cannot be used", "give --tokenizer"):
                for name, content in text["tokenizer_files"].items():
                    (Path(source) / Path(name).name).write_bytes(content.encode("latin-1"))
        elif not options.tokenizer and model.name.startswith(names.FOLDER) and not Path(source).is_dir():
            source = model.name.removeprefix(names.FOLDER)
        failure = (
            f"the tokenizer {source} of {model.name} could not be read, or fetched from huggingface.co; download it "
            "elsewhere and give its folder as --tokenizer FOLDER"
        )
        return load_tokenizer(HFTokenizer, source, failure, **arguments)


def _try_tokenizer(tokenizer: Tokenizer, name: str, known: int) -> None:
    """Tokenize a few captions. Raises UserError for a tokenizer without padding, an unknown token, ..."""
    with translate_errors(f"{name}: its tokenizer cannot read captions", "give --tokenizer"):
        ids = tokenizer(["", "a dog", "\N{DOG FACE} é 狗"])
        is_known = bool((ids >= 0).all() and (ids < known).all())
    if not is_known:
        raise UserError(f"{name}: its tokenizer has ids outside the text tower's vocabulary; give --tokenizer")


def has_pad_id_of(clip: ClipModule, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer pads with the id that a Hugging Face text tower masks; True for other towers."""
    config = getattr(text_part(clip), "config", None)
    pad = 0 if isinstance(tokenizer, SimpleTokenizer) else tokenizer.tokenizer.pad_token_id
    return config is None or config.pad_token_id == pad


def keep_vocabulary(config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Add the tokenizer to the model config, so that a checkpoint needs no folder and no network.

    A WordPiece tokenizer is kept as its vocabulary (`vocab`), others of transformers as the bytes of their files, read
    as Latin-1 (`tokenizer_files`): a model config is plain JSON.
    """
    if isinstance(tokenizer, WordPieceTokenizer):
        config["text_cfg"]["vocab"] = tokenizer.words
    elif isinstance(tokenizer, HFTokenizer):
        with tempfile.TemporaryDirectory() as folder, quiet():
            tokenizer.tokenizer.save_pretrained(folder)
            files = {path.name: path.read_bytes().decode("latin-1") for path in sorted(Path(folder).iterdir())}
            config["text_cfg"]["tokenizer_files"] = files


def _find_word_folder(place: str | None) -> str | None:
    """Return `place` if it is a folder with a vocabulary, else None."""
    return place if place and any((Path(place) / name).is_file() for name in WORD_FILES) else None
