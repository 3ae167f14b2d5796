"""From captions to token ids."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

HF_CHUNK = 8192
LONGEST_TOKEN = 40  # bytes; CLIP's longest has 32


@dataclass(frozen=True)
class Tokens:
    """Token ids of captions.

    Attributes:
        ids: int32 (captions, context_length).
        lengths: int64 (captions,), number of ids up to and including the end token; what follows is padding. Ids
            cannot tell: the "!" of CLIP's vocabulary has the id of the padding, 0.
        cut: number of captions that were longer than the context, and lost words; the end token is kept.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    cut: int


def tokenize(captions: Sequence[str], tokenizer: Callable) -> Tokens:
    """Token ids of `captions`, equal to what `tokenizer` gives, each distinct caption computed once.

    Args:
        captions: the captions.
        tokenizer: one of open_clip's, or models.word_pieces'; it knows its context length.
    """
    index_of: dict[str, int] = {}
    rows = np.fromiter((index_of.setdefault(c, len(index_of)) for c in captions), np.int64, len(captions))
    distinct = list(index_of)
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None:
        ids, lengths, cut = _pack(_byte_pairs(distinct, tokenizer), tokenizer.context_length, 0)
    elif _pads_on_the_right(tokenizer):
        pad = tokenizer.tokenizer.pad_token_id
        ids, lengths, cut = _pack(_pieces(distinct, tokenizer), tokenizer.context_length, pad)
    else:
        ids = tokenizer(distinct).numpy().astype(np.int32)
        lengths, cut = np.full(len(ids), ids.shape[1]), np.zeros(len(ids), bool)
    return Tokens(torch.from_numpy(ids[rows]), torch.from_numpy(lengths[rows]), int(cut[rows].sum()))


def _pack(
    encoded: Iterator[tuple[list[int], bool]], context_length: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, int32 (rows, context_length), lengths, and which are cut, of rows that fit into the context."""
    flat, lengths, cut = array("i"), array("q"), array("b")
    for ids, was_cut in encoded:
        flat.extend(ids)
        lengths.append(len(ids))
        cut.append(was_cut)
    lengths = np.asarray(lengths, np.int64)
    packed = np.full((len(lengths), context_length), pad, np.int32)
    packed[np.arange(context_length) < lengths[:, None]] = np.asarray(flat, np.int32)
    return packed, lengths, np.asarray(cut, bool)


def _byte_pairs(captions: Sequence[str], tokenizer: SimpleTokenizer) -> Iterator[tuple[list[int], bool]]:
    """Ids of `tokenizer.encode` between start and end token; four times faster, as each word is looked up once."""
    start, end, limit = tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.context_length
    lowers = tokenizer.clean_fn is get_clean_fn("lower")
    ids_of: dict[str, list[int]] = {}
    for caption in captions:
        # The cleaning (ftfy, HTML entities) is the slow part, and does nothing to plain ASCII.
        plain = lowers and caption.isascii() and caption.isprintable() and "&" not in caption
        clean = " ".join(caption.split()).lower() if plain else tokenizer.clean_fn(caption)
        ids = [start]
        for word in tokenizer.pat.findall(clean):
            if len(ids) > limit:  # the rest is cut off
                break
            known = ids_of.get(word)
            if known is None:
                # The time for a word grows faster than its length, and no more of it can count.
                counted = word.encode("utf-8")[: limit * LONGEST_TOKEN]
                symbols = "".join(tokenizer.byte_encoder[b] for b in counted)
                known = ids_of[word] = [tokenizer.encoder[pair] for pair in tokenizer.bpe(symbols).split(" ")]
            ids += known
        ids.append(end)
        was_cut = len(ids) > limit
        yield ([*ids[: limit - 1], end] if was_cut else ids), was_cut


def _pads_on_the_right(tokenizer: Callable) -> bool:
    """Whether a Hugging Face tokenizer gives the ids, then the end token, then padding only."""
    return (
        not tokenizer.tokenizer_mode and not tokenizer.strip_sep_token and tokenizer.tokenizer.padding_side == "right"
    )


def _pieces(captions: Sequence[str], tokenizer: Callable) -> Iterator[tuple[list[int], bool]]:
    """Ids of a Hugging Face tokenizer, special tokens included."""
    limit = tokenizer.context_length
    for begin in range(0, len(captions), HF_CHUNK):
        clean = [tokenizer.clean_fn(caption) for caption in captions[begin : begin + HF_CHUNK]]
        encoded = tokenizer.tokenizer(clean, truncation=False, verbose=False).input_ids
        for text, ids in zip(clean, encoded, strict=True):
            if len(ids) > limit:
                yield tokenizer.tokenizer(text, truncation=True, max_length=limit).input_ids, True
            else:
                yield ids, False


HALVES = re.compile("[\ud800-\udfff]")


def clean_caption(text: str) -> str:
    """The caption without blanks around it and on one line, in characters that can be written and tokenised."""
    text = mend_characters(text.strip())
    return " ".join(text.splitlines()) if "\n" in text or "\r" in text else text


def mend_characters(text: str) -> str:
    """The text with U+FFFD for half surrogate pairs, which no tokenizer takes; two halves of one pair are joined.

    They come from JSON that was cut within an emoji (`"\\ud83d"`), and from names of files that are not UTF-8.
    """
    if text.isascii() or not HALVES.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
