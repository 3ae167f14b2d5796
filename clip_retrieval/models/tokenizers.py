"""The tokenizers of all models: open_clip's, those of transformers, and BERT's WordPiece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from clip_retrieval.errors import UserError, describe
from clip_retrieval.models import chinese_clip, hub, names, simple_clip_weights
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.hub import FETCH_ERRORS, quiet
from clip_retrieval.models.hugging_face import load_open_clip_tokenizer, load_tokenizer, read_model_json, read_small
from clip_retrieval.models.instantiate import DEFAULT_CONTEXT_LENGTH
from clip_retrieval.models.towers import text_part
from clip_retrieval.options import ModelOptions

MIN_VOCABULARY = 6
"""transformers returns a vocabulary of the five special tokens if it does not understand the file."""

WORD_FILES = ("vocab.txt", "tokenizer.json")
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
        self.tokenizer = _from_words(source, place) if isinstance(source, list) else _read(source)
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
        # Lower case also keeps a caption with "[SEP]" from being read as the special token.
        return replace_surrogates(text).lower()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Tokenize captions: int64 (texts, context_length), padded with 0."""
        return self.tokenizer(
            [self.clean_fn(text) for text in texts],
            return_tensors="pt",
            max_length=self.context_length,
            padding="max_length",
            truncation=True,
        ).input_ids


def find_word_folder(place: str | None) -> str | None:
    """Return `place` if it is a folder with a vocabulary, else None."""
    return place if place and any((Path(place) / name).is_file() for name in WORD_FILES) else None


def replace_surrogates(text: str) -> str:
    """Replace each half of a surrogate pair by a question mark: no tokenizer of transformers accepts them."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _find_missing_tokens(tokenizer: Any) -> list[str]:
    """Return the special tokens missing from a vocabulary; transformers would append them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.get_vocab(with_added_tokens=False) if backend else tokenizer.get_vocab()
    return [token for token in SPECIAL_TOKENS if token not in words]


def _from_words(words: list[str], place: str) -> Any:
    from transformers import BertTokenizer

    try:
        with quiet():
            return BertTokenizer({word: number for number, word in enumerate(words)})
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{place} cannot be used ({describe(error)})") from error


def _from_file(path: Path) -> Any:
    from transformers import BertTokenizer

    try:
        read_small(path)
        with quiet():
            # transformers 5 ignores the file if it is given as vocab_file=
            return BertTokenizer(str(path))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"--tokenizer {path} is not a vocab.txt ({describe(error)}); give BERT's") from error


def _refuse_cased(settings: Path) -> None:
    if not settings.exists():
        return
    content = read_model_json(settings, "tokenizer config")
    if isinstance(content, dict) and content.get("do_lower_case") is False:
        raise UserError(f"{settings}: its vocabulary is cased, but captions are lower-cased; give an uncased one")


def _read(source: str) -> Any:
    path = Path(source)
    if path.is_dir():
        _refuse_cased(path / "tokenizer_config.json")
        if not (path / "vocab.txt").exists() and (path / "tokenizer.json").exists():
            return load_tokenizer(source)
        path = path / "vocab.txt"
    if path.exists():
        return _from_file(path)
    if path.suffix == ".txt" or path.is_absolute():
        raise UserError(f"--tokenizer {path}: no such file; give BERT's vocab.txt or its folder")
    try:
        return load_tokenizer(source)
    except FETCH_ERRORS:
        raise UserError(
            f"the tokenizer {source} could not be fetched from huggingface.co; give the model's vocabulary as "
            "--tokenizer vocab.txt"
        ) from None


class ChineseTokenizer(WordPieceTokenizer):
    """Chinese-CLIP's WordPiece tokenizer: curly quotes become straight ones."""

    @staticmethod
    def clean_fn(text: str) -> str:
        return WordPieceTokenizer.clean_fn(text).replace("“", '"').replace("”", '"')


def build_tokenizer(options: ModelOptions, model: BuiltModel) -> SimpleTokenizer | HFTokenizer | WordPieceTokenizer:
    """Build the tokenizer of `model`; `data.captions.tokenize` runs it.

    The vocabulary of a WordPiece tokenizer is --tokenizer's, else the one in the model's config, else the one beside
    the weights of --text_pretrained, else the hub's. Raises UserError if it cannot be fetched or read, or has more
    tokens than the text tower.
    """
    text = model.config["text_cfg"]
    length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    known = text_part(model.clip).vocab_size
    arguments = {name: value for name, value in (text.get("tokenizer_kwargs") or {}).items() if value is not None}
    is_chinese = chinese_clip.is_chinese_clip(model.config)
    if is_chinese or simple_clip_weights.is_simple_clip(model.config):
        words = options.tokenizer or text.get("vocab") or find_word_folder(options.text_pretrained)
        words = words or text.get("hf_tokenizer_name") or simple_clip_weights.TEXT_MODEL
        return (ChineseTokenizer if is_chinese else WordPieceTokenizer)(words, length, known, model.config_from)
    if text.get("hf_tokenizer_name"):
        tokenizer = _hf_tokenizer(options, model, length, arguments)
        size = len(tokenizer.tokenizer)
    elif options.tokenizer:
        raise UserError(f"--tokenizer {options.tokenizer}: {model.name} has CLIP's own tokenizer; drop --tokenizer")
    else:
        try:
            tokenizer = SimpleTokenizer(context_length=length, **arguments)
        except TypeError as error:
            raise UserError(
                f"{model.config_from}: its tokenizer_kwargs do not fit CLIP's tokenizer ({error})"
            ) from None
        size = tokenizer.vocab_size
    if size > known:
        raise UserError(
            f"{model.config_from}: the tokenizer has {size:,} tokens, the text tower {known:,}; give the tokenizer of "
            "the model"
        )
    _try_tokenizer(tokenizer, model.config_from, known)
    return tokenizer


def _try_tokenizer(tokenizer: SimpleTokenizer | HFTokenizer, name: str, known: int) -> None:
    """Tokenize a few captions. Raises UserError for a tokenizer without padding, an unknown token, ..."""
    try:
        ids = tokenizer(["", "a dog", "\N{DOG FACE} é 狗"])
        is_known = bool((ids >= 0).all() and (ids < known).all())
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{name}: its tokenizer cannot read captions ({describe(error)}); give --tokenizer") from error
    if not is_known:
        raise UserError(f"{name}: its tokenizer has ids outside the text tower's vocabulary; give --tokenizer")


def keep_vocabulary(config: dict[str, Any], tokenizer: SimpleTokenizer | HFTokenizer | WordPieceTokenizer) -> None:
    """Add the vocabulary of a WordPiece tokenizer to the model config, so that a checkpoint needs no vocab.txt."""
    if isinstance(tokenizer, WordPieceTokenizer):
        config["text_cfg"]["vocab"] = tokenizer.words


def _hf_tokenizer(
    options: ModelOptions, model: BuiltModel, context_length: int, arguments: dict[str, Any]
) -> HFTokenizer:
    text = model.config["text_cfg"]
    source = options.tokenizer or text["hf_tokenizer_name"]
    if not options.tokenizer and model.name.startswith(names.FOLDER):
        source = model.name.removeprefix(names.FOLDER)
    try:
        return load_open_clip_tokenizer(source, context_length, tokenizer_mode=text.get("tokenizer_mode"), **arguments)
    except hub.FETCH_ERRORS:
        raise UserError(
            f"the tokenizer {source} of {model.name} could not be read, or fetched from huggingface.co; download it "
            "elsewhere and give its folder as --tokenizer FOLDER"
        ) from None
