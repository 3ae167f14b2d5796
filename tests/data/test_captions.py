"""Token ids of captions, against the tokenizers themselves."""

import gzip
import json
import random
import string
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from clip_retrieval.data.captions import tokenize
from clip_retrieval.errors import UserError

TOKENIZER = SimpleTokenizer()


def reference(captions, tokenizer=TOKENIZER):
    return tokenizer(captions).int()


def test_ids_are_clips_on_odd_captions():
    captions = [
        "Two dogs &amp; a cat.",
        "Tom &lt;3 Jerry &amp;amp; co",
        "it's   the dog's\tball\n",
        "café, naïve — “quoted” …",
        "schÃ¶n",
        "狗 runs",
        "",
        "   ",
        "A <end_of_text> B",
        "100% <b>bold</b> \x1b[31mred\x1b[0m",
        "x" * 300,
        "AT&T",
        "\x7f\x0cform\x1ffeed",
    ]
    assert torch.equal(tokenize(captions, TOKENIZER).ids, reference(captions))


@given(st.lists(st.text(st.characters(max_codepoint=127)), min_size=1, max_size=5))
def test_ids_are_clips_on_any_ascii(captions):
    assert torch.equal(tokenize(captions, TOKENIZER).ids, reference(captions))


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_ids_are_clips_on_any_text(captions):
    assert torch.equal(tokenize(captions, TOKENIZER).ids, reference(captions))


@pytest.mark.parametrize("data_set", ["coco_text/dataset_coco_karpathy_test", "flickr30k_text/dataset_flickr30k"])
def test_ids_are_clips_on_real_captions(data_set, real_data):
    with gzip.open(real_data / f"{data_set}.json.gz") as file:
        images = json.load(file)["images"]
    captions = [s["raw"] for image in images for s in image["sentences"]]
    # All captions that need the slow cleaning, and a sample of the rest.
    chosen = [c for c in captions if not c.isascii() or not c.isprintable() or "&" in c] + captions[::25]
    tokens = tokenize(chosen, TOKENIZER)
    assert torch.equal(tokens.ids, reference(chosen))
    assert torch.equal(tokens.ids.argmax(1) + 1, tokens.lengths)


def test_lengths_count_up_to_the_end_token():
    tokens = tokenize(["!", "a dog !", "dog"], TOKENIZER)
    assert tokens.ids[0, :4].tolist() == [49406, 256, 49407, 0]
    assert tokens.lengths.tolist() == [3, 5, 3]
    assert (tokens.ids.dtype, tokens.lengths.dtype, tokens.cut) == (torch.int32, torch.int64, 0)


def test_long_captions_keep_the_end_token_and_are_counted():
    tokenizer = SimpleTokenizer(context_length=5)
    captions = ["a b c d e f", "a b c", "a b c d", "a b c d e f"]
    tokens = tokenize(captions, tokenizer)
    assert torch.equal(tokens.ids, reference(captions, tokenizer))
    assert tokens.ids[:, 4].tolist() == [49407] * 4
    assert tokens.lengths.tolist() == [5] * 4
    assert tokens.cut == 3


def test_a_reduction_keeps_some_tokens_of_a_long_caption():
    tokenizer = SimpleTokenizer(context_length=5, reduction_mask="simple")
    tokens = tokenize(["a dog", "a dog and a cat and a cow"], tokenizer)
    assert tokens.ids[0].tolist() == [49406, 320, 1929, 49407, 0]
    assert tokens.ids[1, [0, 4]].tolist() == [49406, 49407]
    assert tokens.lengths.tolist() == [4, 5]


def test_duplicate_captions_are_tokenized_once(monkeypatch):
    seen = []
    tokenizer = SimpleTokenizer(clean="whitespace")
    clean = tokenizer.clean_fn
    monkeypatch.setattr(tokenizer, "clean_fn", lambda text: seen.append(text) or clean(text))
    tokens = tokenize(["dog", "cat", "dog", "dog"], tokenizer)
    assert sorted(seen) == ["cat", "dog"]
    assert torch.equal(tokens.ids[0], tokens.ids[3])


def test_no_captions():
    tokens = tokenize([], TOKENIZER)
    assert (tokens.ids.shape, tokens.lengths.shape, tokens.cut) == ((0, 77), (0,), 0)


@pytest.fixture
def bert_folder(tmp_path):
    """A Hugging Face tokenizer on disk."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    return str(tmp_path / "bert")


def test_ids_are_those_of_a_hugging_face_tokenizer(bert_folder):
    tokenizer = HFTokenizer(bert_folder, context_length=5)
    captions = ["a dog runs", "A  dog", "a dog runs a dog", "", "cat", "a dog"]
    tokens = tokenize(captions, tokenizer)
    assert torch.equal(tokens.ids, reference(captions, tokenizer))
    assert tokens.lengths.tolist() == [5, 4, 5, 2, 3, 4]
    assert tokens.cut == 1


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model_max_length", [1]),  # TypeError
        ("vocab", {"[PAD]": 2**31, "[UNK]": 2**31 + 1, "[CLS]": 2**31 + 2, "[SEP]": 2**31 + 3}),  # OverflowError
        ("vocab", {"[PAD]": 0, "[CLS]": 2, "[SEP]": 3, "a": 4}),  # the library's own error: no [UNK] for "dog"
    ],
)
def test_a_damaged_hugging_face_tokenizer_is_named(part, value, bert_folder):
    folder = Path(bert_folder)
    if part == "vocab":
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"] = value
        (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = HFTokenizer(bert_folder, context_length=5)
    if part != "vocab":
        setattr(tokenizer.tokenizer, part, value)
    with pytest.raises(UserError, match=r"the tokenizer cannot read the captions .*--tokenizer") as error:
        tokenize(["a dog", "a cat"], tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("odd", [{"strip_sep_token": True}, {"tokenizer_mode": "clips"}])
def test_padding_on_the_left_counts_as_ids(odd, bert_folder):
    tokenizer = HFTokenizer(bert_folder, context_length=8, **odd)
    tokenizer.tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    captions = ["a dog runs", "a dog"]
    tokens = tokenize(captions, tokenizer)
    assert torch.equal(tokens.ids, reference(captions, tokenizer))
    assert tokens.lengths.tolist() == [8, 8]


def test_long_words_have_the_ids_of_clip():
    rng = random.Random(0)
    words = ["".join(rng.choices(letters, k=5000)) for letters in ("ab", "etaoin", "xyzé", "红色的包狗猫", "🐶😂")]
    words += ["x" * 9000, "blackandwhitephotography" * 300, "😂" * 4000]
    captions = [f"{before}{word}{after}" for word in words for before, after in (("", ""), ("a photo of ", " dog"))]
    assert torch.equal(tokenize(captions, TOKENIZER).ids, reference(captions))


@pytest.mark.parametrize("letters", [string.ascii_lowercase, "".join(map(chr, range(0x4E00, 0x5000)))])
def test_a_caption_of_a_million_letters_takes_seconds(letters):
    rng = random.Random(1)
    captions = [
        "".join(rng.choices(letters, k=10**6)),
        " ".join("".join(rng.choices(letters, k=9)) for _ in range(10**5)),
    ]
    began = time.process_time()
    tokens = tokenize(captions, TOKENIZER)
    assert tokens.cut == 2 and time.process_time() - began < 10
