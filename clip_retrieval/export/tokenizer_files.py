"""Tokenizer files of transformers, for any tokenizer of this package."""

from __future__ import annotations

import copy
import string
from typing import Any

from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

from clip_retrieval.data.captions import Tokenizer
from clip_retrieval.models.word_piece import ChineseTokenizer


def to_transformers(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as a class of transformers, which cleans texts as `tokenizer` does.

    transformers does not repair broken Unicode (ftfy) or HTML entities, as open_clip does.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        from transformers import CLIPTokenizer

        merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
        special = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
        vocabulary = {special.get(number, token): number for token, number in tokenizer.encoder.items()}
        return CLIPTokenizer(vocabulary, merges, model_max_length=tokenizer.context_length)
    converted = copy.deepcopy(tokenizer.tokenizer)
    converted.model_max_length = tokenizer.context_length
    backend, steps = getattr(converted, "backend_tokenizer", None), _cleaning_steps(tokenizer)
    if backend is None or not steps:
        return converted
    return _with_normalizer(converted, steps)


def _cleaning_steps(tokenizer: Any) -> list[Any]:
    """Return the steps of a tokenizer's `clean_fn` as normalizers of the tokenizers library."""
    from tokenizers import Regex
    from tokenizers.normalizers import Lowercase, Replace, Strip

    if isinstance(tokenizer, ChineseTokenizer):
        return [Replace("“", '"'), Replace("”", '"')]
    spaces = [Replace(Regex(r"\s+"), " "), Strip()]
    if tokenizer.clean_fn is get_clean_fn("lower"):
        return [Lowercase(), *spaces]
    if tokenizer.clean_fn is get_clean_fn("canonicalize"):
        punctuation = "".join(f"\\{character}" for character in string.punctuation if character != "_")
        return [Replace("_", " "), Replace(Regex(f"[{punctuation}]"), ""), Lowercase(), *spaces]
    return []


def _with_normalizer(tokenizer: Any, steps: list[Any]) -> Any:
    """Return a copy of a tokenizer that applies `steps` first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import Sequence
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
    own = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = Sequence([*steps, *own])
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
        **special,
    )
