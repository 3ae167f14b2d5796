"""The tokenizers of all models: open_clip's, those of transformers, and BERT's word pieces (WordPiece)."""

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
"""transformers gives a vocabulary of the five special tokens where it did not understand the file."""

WORD_FILES = ("vocab.txt", "tokenizer.json")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class WordPieceTokenizer:
    """BERT's word pieces, uncased: [CLS] pieces [SEP].

    It has the attributes of open_clip's HFTokenizer, and is used as one.

    Args:
        source: a vocab.txt, a folder with one or with a tokenizer.json, a hub name, or the words themselves in the
            order of their ids.
        context_length: in tokens; longer captions are cut, keeping [SEP].
        vocabulary: number of tokens the text tower knows.
        holder: the file that words themselves are from, for messages.

    Raises:
        UserError: the vocabulary is not there, or is another than the text tower's, or cased.
    """

    tokenizer_mode = ""
    strip_sep_token = False

    def __init__(self, source: str | list[str], context_length: int, vocabulary: int, holder: str = ""):
        place = f"--tokenizer {source}"
        if isinstance(source, list):
            place = f"{holder}: " * bool(holder) + "the vocabulary in the model config"
        self.tokenizer = _of_words(source, place) if isinstance(source, list) else _read(source)
        self.context_length = context_length
        if missing := _missing_tokens(self.tokenizer):
            raise UserError(f"{place} has no {', '.join(missing)}; give BERT's vocab.txt")
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
        return replace_surrogates(text).lower()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 (texts, context_length), padded with 0."""
        return self.tokenizer(
            [self.clean_fn(text) for text in texts],
            return_tensors="pt",
            max_length=self.context_length,
            padding="max_length",
            truncation=True,
        ).input_ids


def find_word_folder(place: str | None) -> str | None:
    """`place`, where it is a folder that holds a vocabulary."""
    return place if place and any((Path(place) / name).is_file() for name in WORD_FILES) else None


def replace_surrogates(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair: no tokenizer of transformers takes them."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _missing_tokens(tokenizer: Any) -> list[str]:
    """The special tokens that a vocabulary lacks; transformers would add them behind its end."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.get_vocab(with_added_tokens=False) if backend else tokenizer.get_vocab()
    return [token for token in SPECIAL_TOKENS if token not in words]


def _of_words(words: list[str], place: str) -> Any:
    from transformers import BertTokenizer

    try:
        with quiet():
            return BertTokenizer({word: number for number, word in enumerate(words)})
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{place} cannot be used ({describe(error)})") from error


def _of_file(path: Path) -> Any:
    from transformers import BertTokenizer

    try:
        read_small(path)
        with quiet():
            # By position: given as vocab_file=, transformers 5 ignores it.
            return BertTokenizer(str(path))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"--tokenizer {path} is not a vocab.txt ({describe(error)}); give BERT's") from error


def _refuse_cased(settings: Path) -> None:
    if not settings.exists():
        return
    content = read_model_json(settings, "tokenizer config")
    if isinstance(content, dict) and content.get("do_lower_case") is False:
        raise UserError(f"{settings}: its vocabulary is cased, captions are read in lower case; give an uncased one")


def _read(source: str) -> Any:
    path = Path(source)
    if path.is_dir():
        _refuse_cased(path / "tokenizer_config.json")
        if not (path / "vocab.txt").exists() and (path / "tokenizer.json").exists():
            return load_tokenizer(source)
        path = path / "vocab.txt"
    if path.exists():
        return _of_file(path)
    if path.suffix == ".txt" or path.is_absolute():
        raise UserError(f"--tokenizer {path}: no such file; give BERT's vocab.txt or the folder it is in")
    try:
        return load_tokenizer(source)
    except FETCH_ERRORS:
        raise UserError(
            f"the tokenizer {source} could not be fetched from huggingface.co; give the model's word list as "
            "--tokenizer vocab.txt"
        ) from None


class ChineseTokenizer(WordPieceTokenizer):
    """Word pieces as Chinese-CLIP makes them: curly quotes straightened."""

    @staticmethod
    def clean_fn(text: str) -> str:
        return WordPieceTokenizer.clean_fn(text).replace("“", '"').replace("”", '"')


def build_tokenizer(options: ModelOptions, model: BuiltModel) -> SimpleTokenizer | HFTokenizer | WordPieceTokenizer:
    """The tokenizer that goes with `model`; `data.captions.tokenize` runs it.

    A WordPiece tokenizer has the words of --tokenizer, else those in the model's config, else those beside the weights
    of --text_pretrained, else the hub's. Raises UserError where it cannot be had, or has more tokens than the text
    tower knows.
    """
    text = model.config["text_cfg"]
    length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    known = text_part(model.clip).vocab_size
    arguments = {name: value for name, value in (text.get("tokenizer_kwargs") or {}).items() if value is not None}
    is_chinese = chinese_clip.is_chinese_clip(model.config)
    if is_chinese or simple_clip_weights.is_simple_clip(model.config):
        words = options.tokenizer or text.get("vocab") or find_word_folder(options.text_pretrained)
        words = words or text.get("hf_tokenizer_name") or simple_clip_weights.TEXT_MODEL
        of_its_kind = ChineseTokenizer if is_chinese else WordPieceTokenizer
        return of_its_kind(words, length, known, model.config_from)
    if text.get("hf_tokenizer_name"):
        tokenizer = _hf_tokenizer(options, model, length, arguments)
        size = len(tokenizer.tokenizer)
    elif options.tokenizer:
        raise UserError(f"--tokenizer {options.tokenizer}: {model.name} has CLIP's own tokenizer; leave it out")
    else:
        try:
            tokenizer = SimpleTokenizer(context_length=length, **arguments)
        except TypeError as error:
            raise UserError(
                f"{model.config_from}: its tokenizer_kwargs are not those of CLIP's tokenizer ({error})"
            ) from None
        size = tokenizer.vocab_size
    if size > known:
        raise UserError(
            f"{model.config_from}: the tokenizer has {size:,} tokens, the text tower knows {known:,}; give the "
            "tokenizer that belongs to it"
        )
    _try_tokenizer(tokenizer, model.config_from, known)
    return tokenizer


def _try_tokenizer(tokenizer: SimpleTokenizer | HFTokenizer, name: str, known: int) -> None:
    """Tokenise a few captions. Raises UserError for a tokenizer without padding, a word for the unknown, and so on."""
    try:
        ids = tokenizer(["", "a dog", "\N{DOG FACE} é 狗"])
        is_known = bool((ids >= 0).all() and (ids < known).all())
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{name}: its tokenizer cannot read captions ({describe(error)}); give --tokenizer") from error
    if not is_known:
        raise UserError(f"{name}: its tokenizer has ids that the text tower does not know; give --tokenizer")


def keep_vocabulary(config: dict[str, Any], tokenizer: SimpleTokenizer | HFTokenizer | WordPieceTokenizer) -> None:
    """Put the words of a WordPiece tokenizer into its model's config: no checkpoint needs a vocab.txt beside it."""
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
            f"the tokenizer {source} of {model.name} could not be read, or fetched from huggingface.co; a folder that "
            "it was downloaded to is given as --tokenizer FOLDER"
        ) from None
