"""BERT's WordPiece tokenizer, and Chinese-CLIP's variant of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models.hugging_face import load_tokenizer, read_model_json, read_small
from clip_retrieval.models.libraries import translate_errors

MIN_VOCABULARY = 6
"""transformers returns a vocabulary of the five special tokens if it does not understand the file."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class WordPieceTokenizer:
    """BERT's WordPiece tokenizer, uncased: [CLS] pieces [SEP]. It has the attributes of open_clip's HFTokenizer.

    Args:
        source: a vocab.txt, a folder with a vocab.txt or a tokenizer.json, a hub name, or a list of words in the order
            of their ids.
        context_length: in tokens; longer captions are cut, keeping [SEP].
        vocabulary: vocabulary size of the text tower.
        holder: the file that holds a list of words, for messages.

    Raises:
        UserError: the vocabulary is missing, does not fit the text tower, or is cased.
    """

    tokenizer_mode = ""
    strip_sep_token = False

    def __init__(self, source: str | list[str], context_length: int, vocabulary: int, holder: str = ""):
        place = f"--tokenizer {source}"
        if isinstance(source, list):
            place = f"{holder}: " * bool(holder) + "the vocabulary in the model config"
        self.tokenizer = _read(source, place)
        self.context_length = context_length
        if missing := _find_missing_tokens(self.tokenizer):
            raise UserError(f"{place} has no {', '.join(missing)}; give BERT's vocab.txt")
        if len(self.tokenizer) != vocabulary or vocabulary < MIN_VOCABULARY:
            raise UserError(
                f"{place} has {len(self.tokenizer):,} entries, the text tower {vocabulary:,}; give the vocab.txt of "
                "the model"
            )
        if self.tokenizer.pad_token_id != 0:  # the text towers mask id 0
            raise UserError(f"{place}: [PAD] must be its first entry; give BERT's vocab.txt")

    @property
    def words(self) -> list[str]:
        """The vocabulary in the order of its ids; it may be given as `source`."""
        ids = self.tokenizer.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    @staticmethod
    def clean_fn(text: str) -> str:
        # No tokenizer of transformers accepts half a surrogate pair: "replace" makes a question mark of it.
        # Lower case also keeps a caption with "[SEP]" from being read as the special token.
        return text.encode("utf-8", errors="replace").decode("utf-8").lower()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Tokenize captions: int64 (texts, context_length), padded with 0."""
        return self.tokenizer(
            [self.clean_fn(text) for text in texts],
            return_tensors="pt",
            max_length=self.context_length,
            padding="max_length",
            truncation=True,
        ).input_ids


def _find_missing_tokens(tokenizer: Any) -> list[str]:
    """Return the special tokens missing from a vocabulary; transformers would append them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.get_vocab(with_added_tokens=False) if backend else tokenizer.get_vocab()
    return [token for token in SPECIAL_TOKENS if token not in words]


def _read(source: str | list[str], place: str) -> Any:
    from transformers import AutoTokenizer, BertTokenizer

    # a list of words
    if isinstance(source, list):
        with translate_errors(f"{place} cannot be used", "give --tokenizer"):
            return BertTokenizer({word: number for number, word in enumerate(source)})

    # a vocab.txt
    path = folder = Path(source)
    if folder.is_dir():
        _refuse_cased(folder / "tokenizer_config.json")
        path = folder / "vocab.txt"
    if path.exists():
        with translate_errors(f"--tokenizer {path} is not a vocab.txt", "give BERT's"):
            read_small(path)
            return BertTokenizer(str(path))  # transformers 5 ignores the file if it is given as vocab_file=

    # a folder with a tokenizer.json, or a hub name
    if (path.suffix == ".txt" or path.is_absolute()) and not (folder / "tokenizer.json").exists():
        raise UserError(f"--tokenizer {path}: no such file; give BERT's vocab.txt or its folder")
    failure = f"the tokenizer {source} could not be fetched from huggingface.co; give the model's vocabulary as "
    return load_tokenizer(AutoTokenizer.from_pretrained, source, f"{failure}--tokenizer vocab.txt")


def _refuse_cased(settings: Path) -> None:
    content = read_model_json(settings, "tokenizer config") if settings.exists() else None
    if isinstance(content, dict) and content.get("do_lower_case") is False:
        raise UserError(f"{settings}: its vocabulary is cased, but captions are lower-cased; give an uncased one")


class ChineseTokenizer(WordPieceTokenizer):
    """Chinese-CLIP's WordPiece tokenizer: curly quotes become straight ones."""

    @staticmethod
    def clean_fn(text: str) -> str:
        return WordPieceTokenizer.clean_fn(text).replace("“", '"').replace("”", '"')
