"""Cleaning of captions, and their token ids."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from clip_retrieval.errors import UserError, describe

if TYPE_CHECKING:  # the readers need `clean_caption` only, without torch
    import torch
    from open_clip.tokenizer import SimpleTokenizer

HF_CHUNK = 8192  # captions per call
LONGEST_TOKEN = 40  # bytes; CLIP's longest token has 32


@dataclass(frozen=True)
class Tokens:
    """Token ids of captions.

    Attributes:
        ids: int32 (captions, context_length).
        lengths: int64 (captions,), number of ids without padding. The ids alone are ambiguous: "!" in CLIP's vocabulary
            has the id of the padding, 0, and a caption may spell the end token.
        cut: number of captions truncated to the context; their end token is kept.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    cut: int


class HuggingFaceTokenizer(Protocol):
    """open_clip's HFTokenizer, or a WordPieceTokenizer."""

    tokenizer: Any
    """The tokenizer of transformers."""
    context_length: int
    tokenizer_mode: str
    strip_sep_token: bool

    def clean_fn(self, text: str, /) -> str: ...

    def __call__(self, texts: list[str], /) -> torch.Tensor: ...


Tokenizer: TypeAlias = "SimpleTokenizer | HuggingFaceTokenizer"
"""SimpleTokenizer is CLIP's own."""


def tokenize(captions: Sequence[str], tokenizer: Tokenizer, prefix: str | None = None) -> Tokens:
    """Tokenize captions, with the ids of `tokenizer`, each distinct caption once.

    Args:
        captions: the captions.
        tokenizer: a tokenizer of open_clip or of models.tokenizers.
        prefix: text before every caption.

    Raises:
        UserError: a Hugging Face tokenizer fails.
    """
    import torch
    from open_clip.tokenizer import SimpleTokenizer

    index_of: dict[str, int] = {}
    rows = np.fromiter((index_of.setdefault(c, len(index_of)) for c in captions), np.int64, len(captions))
    distinct = [f"{prefix or ''}{caption}" for caption in index_of]
    if isinstance(tokenizer, SimpleTokenizer):
        ids, lengths, cut = _tokenize_clip(distinct, tokenizer)
    else:
        # a Hugging Face tokenizer is made from a user's files, and may fail in any way at any caption
        try:
            ids, lengths, cut = _tokenize_hugging_face(distinct, tokenizer)
        except Exception as error:
            raise UserError(
                f"the tokenizer cannot read the captions ({describe(error)}); give a complete one as --tokenizer"
            ) from error
    return Tokens(torch.from_numpy(ids[rows]), torch.from_numpy(lengths[rows]), int(cut[rows].sum()))


def _pack(
    encoded: Iterator[tuple[list[int], bool]], context_length: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad ids to the context: int32 (rows, context_length), their lengths, and whether each row is cut."""
    flat, counts, cut = array("i"), array("q"), array("b")
    for ids, is_cut in encoded:
        flat.extend(ids)
        counts.append(len(ids))
        cut.append(is_cut)
    lengths = np.asarray(counts, np.int64)
    packed = np.full((len(lengths), context_length), pad, np.int32)
    packed[np.arange(context_length) < lengths[:, None]] = np.asarray(flat, np.int32)
    return packed, lengths, np.asarray(cut, bool)


def _tokenize_clip(captions: list[str], tokenizer: SimpleTokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize captions: ids, lengths, and whether they are cut, as `_pack` returns them."""
    if tokenizer.reduction_fn is None:
        return _pack(_encode_clip(captions, tokenizer), tokenizer.context_length, 0)
    # a reduction drops random tokens of captions that do not fit
    ids = tokenizer(captions).numpy().astype(np.int32)
    is_end = ids == tokenizer.eot_token_id
    return ids, ids.shape[1] - is_end[:, ::-1].argmax(axis=1), np.zeros(len(ids), bool)


def _encode_clip(captions: Sequence[str], tokenizer: SimpleTokenizer) -> Iterator[tuple[list[int], bool]]:
    """Yield the ids of `tokenizer.encode` between start and end token; four times faster, as it caches words."""
    from open_clip.tokenizer import get_clean_fn

    start, end, limit = tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.context_length
    lowers = tokenizer.clean_fn is get_clean_fn("lower")
    ids_of: dict[str, list[int]] = {}
    for caption in captions:
        # clean: ftfy and HTML entities are slow, and do not change plain ASCII
        plain = lowers and caption.isascii() and caption.isprintable() and "&" not in caption
        clean = " ".join(caption.split()).lower() if plain else tokenizer.clean_fn(caption)

        # look up each word
        ids = [start]
        for word in tokenizer.pat.findall(clean):
            if len(ids) > limit:  # the rest is truncated
                break
            known = ids_of.get(word)
            if known is None:
                # BPE is slower than linear in the length of a word; bytes beyond the context cannot matter.
                used = word.encode("utf-8")[: limit * LONGEST_TOKEN]
                symbols = "".join(tokenizer.byte_encoder[b] for b in used)
                known = ids_of[word] = [tokenizer.encoder[pair] for pair in tokenizer.bpe(symbols).split(" ")]
            ids += known

        # truncate to the context
        ids.append(end)
        is_cut = len(ids) > limit
        yield ([*ids[: limit - 1], end] if is_cut else ids), is_cut


def _tokenize_hugging_face(
    captions: list[str], tokenizer: HuggingFaceTokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize captions: ids, lengths, and whether they are cut, as `_pack` returns them."""
    if _pads_right(tokenizer):
        pad = tokenizer.tokenizer.pad_token_id
        return _pack(_encode_hugging_face(captions, tokenizer), tokenizer.context_length, pad)
    ids = tokenizer(captions).numpy().astype(np.int32)
    return ids, np.full(len(ids), ids.shape[1]), np.zeros(len(ids), bool)


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the id behind the captions of a tokenizer. Raises UserError if it pads at the left."""
    from open_clip.tokenizer import SimpleTokenizer

    if isinstance(tokenizer, SimpleTokenizer):
        return 0
    if tokenizer.tokenizer.padding_side != "right":
        raise UserError("--word_dropout: not for this model's tokenizer, which pads at the left; drop it")
    return int(tokenizer.tokenizer.pad_token_id)


def _pads_right(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether a Hugging Face tokenizer returns the ids, then the end token, then only padding."""
    return (
        not tokenizer.tokenizer_mode and not tokenizer.strip_sep_token and tokenizer.tokenizer.padding_side == "right"
    )


def _encode_hugging_face(captions: list[str], tokenizer: HuggingFaceTokenizer) -> Iterator[tuple[list[int], bool]]:
    """Yield the ids of a Hugging Face tokenizer, with special tokens, and whether they are cut."""
    limit = tokenizer.context_length
    for begin in range(0, len(captions), HF_CHUNK):
        clean = [tokenizer.clean_fn(caption) for caption in captions[begin : begin + HF_CHUNK]]
        encoded = tokenizer.tokenizer(clean, truncation=False, verbose=False).input_ids
        for text, ids in zip(clean, encoded, strict=True):
            if len(ids) > limit:
                yield tokenizer.tokenizer(text, truncation=True, max_length=limit).input_ids, True
            else:
                yield ids, False


SURROGATES = re.compile("[\ud800-\udfff]")
WORDLESS = re.compile(r"[\W_]+")


def clean_caption(text: str) -> str:
    """Strip a caption, join its lines, and replace characters that cannot be written or tokenized."""
    text = mend_characters(text.strip())
    return " ".join(text.splitlines()) if "\n" in text or "\r" in text else text


def normalize_caption(text: str) -> str:
    """Return the letters and digits of a caption, in lower case; a caption without any stays."""
    return WORDLESS.sub("", text.casefold()) or text


def mend_characters(text: str) -> str:
    """Replace half surrogate pairs, which no tokenizer accepts, by U+FFFD; join the two halves of a pair.

    They come from JSON that was truncated within an emoji (`"\\ud83d"`), and from file names that are not UTF-8.
    """
    if text.isascii() or not SURROGATES.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
