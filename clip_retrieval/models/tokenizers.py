"""The tokenizers of all models: open_clip's, those of transformers, and BERT's WordPiece."""

from __future__ import annotations

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
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.towers import text_part
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
    if family.tokenizer:
        words = options.tokenizer or text.get("vocab") or _find_word_folder(options.text_pretrained)
        words = words or _find_word_folder(model.name.removeprefix(names.FOLDER))
        words = words or text.get("hf_tokenizer_name") or next(iter(family.towers.text_models))
        return family.tokenizer(words, length, known, model.config_from)
    if text.get("hf_tokenizer_name"):
        source = options.tokenizer or text["hf_tokenizer_name"]
        if not options.tokenizer and model.name.startswith(names.FOLDER):
            source = model.name.removeprefix(names.FOLDER)
        failure = (
            f"the tokenizer {source} of {model.name} could not be read, or fetched from huggingface.co; download it "
            "elsewhere and give its folder as --tokenizer FOLDER"
        )
        arguments |= {"context_length": length, "tokenizer_mode": text.get("tokenizer_mode")}
        tokenizer = load_tokenizer(HFTokenizer, source, failure, **arguments)
        size = len(tokenizer.tokenizer)
    elif options.tokenizer:
        raise UserError(f"--tokenizer {options.tokenizer}: {model.name} has CLIP's own tokenizer; drop --tokenizer")
    else:
        with translate_errors(f"{model.config_from}: its tokenizer_kwargs do not fit CLIP's tokenizer", "drop them"):
            tokenizer = SimpleTokenizer(context_length=length, **arguments)
        size = tokenizer.vocab_size
    if size > known:
        raise UserError(
            f"{model.config_from}: the tokenizer has {size:,} tokens, the text tower {known:,}; give the tokenizer of "
            "the model"
        )
    _try_tokenizer(tokenizer, model.config_from, known)
    return tokenizer


def _try_tokenizer(tokenizer: Tokenizer, name: str, known: int) -> None:
    """Tokenize a few captions. Raises UserError for a tokenizer without padding, an unknown token, ..."""
    with translate_errors(f"{name}: its tokenizer cannot read captions", "give --tokenizer"):
        ids = tokenizer(["", "a dog", "\N{DOG FACE} é 狗"])
        is_known = bool((ids >= 0).all() and (ids < known).all())
    if not is_known:
        raise UserError(f"{name}: its tokenizer has ids outside the text tower's vocabulary; give --tokenizer")


def keep_vocabulary(config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Add the vocabulary of a WordPiece tokenizer to the model config, so that a checkpoint needs no vocab.txt."""
    if isinstance(tokenizer, WordPieceTokenizer):
        config["text_cfg"]["vocab"] = tokenizer.words


def _find_word_folder(place: str | None) -> str | None:
    """Return `place` if it is a folder with a vocabulary, else None."""
    return place if place and any((Path(place) / name).is_file() for name in WORD_FILES) else None
