"""WordPiece tokenizers, BERT's: their vocabulary from a vocab.txt, a folder, the hub, or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models.hub import FETCH_ERRORS, hub_access, quiet

MIN_VOCABULARY = 6
"""transformers gives a vocabulary of the five special tokens where it did not understand the file."""

WORD_FILES = ("vocab.txt", "tokenizer.json")


class WordPieceTokenizer:
    """BERT's word pieces, uncased: [CLS] pieces [SEP].

    It has the attributes of open_clip's HFTokenizer, and is used as one.

    Args:
        source: a vocab.txt, a folder with one or with a tokenizer.json, a hub name, or the words themselves in the
            order of their ids.
        context_length: in tokens; longer captions are cut, keeping [SEP].
        vocabulary: number of tokens the text tower knows.

    Raises:
        UserError: the vocabulary is not there, or is another than the text tower's, or cased.
    """

    tokenizer_mode = ""
    strip_sep_token = False

    def __init__(self, source: str | list[str], context_length: int, vocabulary: int):
        self.tokenizer = _of_words(source) if isinstance(source, list) else _read(source)
        self.context_length = context_length
        place = "the vocabulary in the model config" if isinstance(source, list) else f"--tokenizer {source}"
        if len(self.tokenizer) != vocabulary or vocabulary < MIN_VOCABULARY:
            raise UserError(
                f"{place} has {len(self.tokenizer):,} entries, the text tower {vocabulary:,}; give the vocab.txt that "
                "belongs to the model"
            )
        if self.tokenizer.pad_token_id != 0:  # what the towers take for padding
            raise UserError(f"{place}: [PAD] must be its first entry; give BERT's vocab.txt")

    @property
    def words(self) -> list[str]:
        """The vocabulary in the order of its ids; `source` may be this list."""
        ids = self.tokenizer.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    @staticmethod
    def clean_fn(text: str) -> str:
        # Also keeps a caption that spells "[SEP]" out from being read as the special token.
        return text.lower()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 (texts, context_length), padded with 0."""
        return self.tokenizer(
            [self.clean_fn(text) for text in texts],
            return_tensors="pt",
            max_length=self.context_length,
            padding="max_length",
            truncation=True,
        ).input_ids


def folder_of_words(place: str | None) -> str | None:
    """`place`, where it is a folder that holds a vocabulary."""
    return place if place and any((Path(place) / name).is_file() for name in WORD_FILES) else None


def _of_words(words: list[str]) -> Any:
    from transformers import BertTokenizer

    with quiet():
        return BertTokenizer({word: number for number, word in enumerate(words)})


def _saved(folder: Path) -> Any:
    """The tokenizer that transformers' save_pretrained wrote."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--tokenizer {folder}: its tokenizer.json cannot be read ({reason})") from error


def _refuse_cased(settings: Path) -> None:
    try:
        cased = json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case") is False
    except (OSError, ValueError, AttributeError):
        return
    if cased:
        raise UserError(f"{settings}: its vocabulary is cased, captions are read in lower case; give an uncased one")


def _read(source: str) -> Any:
    from transformers import AutoTokenizer, BertTokenizer

    path = Path(source)
    if path.is_dir():
        _refuse_cased(path / "tokenizer_config.json")
        if not (path / "vocab.txt").exists() and (path / "tokenizer.json").exists():
            return _saved(path)
        path = path / "vocab.txt"
    if path.exists():
        try:
            with quiet():
                # By position: given as vocab_file=, transformers 5 ignores it.
                return BertTokenizer(str(path))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise UserError(f"--tokenizer {path} is not a vocab.txt ({str(error).splitlines()[0]})") from error
    if path.suffix == ".txt" or path.is_absolute():
        raise UserError(f"--tokenizer {path}: no such file; give BERT's vocab.txt or the folder it is in")
    try:
        with hub_access():
            return AutoTokenizer.from_pretrained(source)
    except FETCH_ERRORS:
        raise UserError(
            f"the tokenizer {source} could not be fetched from huggingface.co; give the model's word list as "
            "--tokenizer vocab.txt"
        ) from None
