import json
import os
from functools import partial
from importlib.util import find_spec

import pytest
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from transformers import BertTokenizer

from clip_retrieval.data.captions import tokenize
from clip_retrieval.errors import UserError
from clip_retrieval.models.hugging_face import load_tokenizer
from clip_retrieval.models.word_piece import ChineseTokenizer, WordPieceTokenizer
from tests.models.small import WORDS

CAPTIONS = ["A red dogs thing", "cafés", "[SEP] a", "", "a a a a a a a a"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "words" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


def test_captions_become_lower_case_pieces_between_cls_and_sep(vocabulary):
    for source in (vocabulary, vocabulary.parent):
        tokens = tokenize(CAPTIONS, WordPieceTokenizer(str(source), 7, len(WORDS)))
        assert tokens.ids.tolist() == [
            [2, 5, 7, 9, 10, 6, 3],
            [2, 11, 10, 3, 0, 0, 0],
            [2, 1, 1, 1, 5, 3, 0],  # text, not a special token
            [2, 3, 0, 0, 0, 0, 0],
            [2, 5, 5, 5, 5, 5, 3],  # cut, [SEP] kept
        ]
        assert (tokens.lengths.tolist(), tokens.cut) == ([7, 4, 6, 2, 7], 1)


@pytest.mark.parametrize("kind", [WordPieceTokenizer, ChineseTokenizer])
def test_list_of_words_makes_the_same_tokenizer(vocabulary, kind):
    tokenizer = kind(str(vocabulary), 7, len(WORDS))
    assert tokenizer.words == WORDS
    again = kind(tokenizer.words, 7, len(WORDS))
    assert tokenize(CAPTIONS, again).ids.tolist() == tokenize(CAPTIONS, tokenizer).ids.tolist()
    assert again(CAPTIONS).tolist() == tokenizer(CAPTIONS).tolist()


def test_vocabulary_of_another_size_is_refused(vocabulary):
    with pytest.raises(UserError, match=r"--tokenizer .*vocab.txt has 13 entries, the text tower 20"):
        WordPieceTokenizer(str(vocabulary), 7, 20)
    with pytest.raises(UserError, match=r"the vocabulary in the model config has 12 entries, the text tower 13"):
        WordPieceTokenizer(WORDS[:-1], 7, 13)


@pytest.fixture
def saved(vocabulary, tmp_path):
    """A folder as transformers 5 saves a tokenizer: without a vocab.txt."""
    BertTokenizer(str(vocabulary)).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "vocab.txt").unlink(missing_ok=True)
    return tmp_path / "saved"


def test_saved_tokenizer_is_read_without_a_network(vocabulary, saved, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network is asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    tokenizer = WordPieceTokenizer(str(saved), 7, len(WORDS))
    assert tokenizer.words == WORDS
    assert tokenizer(CAPTIONS).tolist() == WordPieceTokenizer(str(vocabulary), 7, len(WORDS))(CAPTIONS).tolist()


def test_broken_saved_tokenizer_is_named(saved):
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"the tokenizer .*saved cannot be read \(.*; give another --tokenizer"):
        WordPieceTokenizer(str(saved), 7, len(WORDS))


def test_missing_package_of_a_tokenizer_is_named():
    def load(*_, **__):
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library")

    with pytest.raises(UserError, match="the tokenizer words needs a further package; pip install sentencepiece"):
        load_tokenizer(load, "words", "")


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
@pytest.mark.parametrize("kind", ["SiglipTokenizer", "T5Tokenizer", "XLMRobertaTokenizer", None])
def test_sentencepiece_model_needs_its_package(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    for name in ("spiece.model", "sentencepiece.bpe.model"):
        (tmp_path / name).write_bytes(b"\n\x0e\n\x05<pad>\x15\0\0\0\0\x18\x03")
    if kind:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError, match=rf"{tmp_path} needs a further package; pip install sentencepiece protobuf$"):
        load_tokenizer(HFTokenizer, str(tmp_path), "")


def test_vocabulary_with_nonzero_padding_id_is_refused(vocabulary):
    vocabulary.write_text("\n".join([*WORDS[1:], "[PAD]"]) + "\n")
    with pytest.raises(UserError, match=r"--tokenizer .*vocab.txt: \[PAD\] must be its first entry"):
        WordPieceTokenizer(str(vocabulary), 7, len(WORDS))


def test_cased_vocabulary_is_refused(vocabulary):
    (vocabulary.parent / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(UserError, match=r"tokenizer_config.json: its vocabulary is cased"):
        WordPieceTokenizer(str(vocabulary.parent), 7, len(WORDS))


@pytest.mark.parametrize("token", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
def test_vocabulary_without_a_special_token_is_refused(vocabulary, token):
    words = [word for word in WORDS if word != token]
    vocabulary.write_text("\n".join(words) + "\n")
    for size in (len(words), len(WORDS)):
        with pytest.raises(UserError, match=rf"vocab.txt has no \{token}"):
            WordPieceTokenizer(str(vocabulary), 7, size)
        with pytest.raises(UserError, match=rf"^last.pt: the vocabulary in the model config has no \{token}"):
            WordPieceTokenizer(words, 7, size, "last.pt")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00", b"a" * 1000, bytes(range(256))])
def test_invalid_vocabulary_file_is_refused(vocabulary, content):
    vocabulary.write_bytes(content)
    with pytest.raises(UserError, match=r"^--tokenizer [^\n]*vocab.txt [^\n]*$"):
        WordPieceTokenizer(str(vocabulary), 7, len(WORDS))


def test_special_vocabulary_file_is_refused(vocabulary):
    vocabulary.unlink()
    os.mkfifo(vocabulary)
    with pytest.raises(UserError, match="not a regular file"):
        WordPieceTokenizer(str(vocabulary), 7, len(WORDS))
    with pytest.raises(UserError, match="not a regular file"):
        WordPieceTokenizer(str(vocabulary.parent), 7, len(WORDS))


@pytest.mark.parametrize("words", [["\ud800", *WORDS[1:]], [*WORDS[:-1], WORDS[0]], [*WORDS[:-1], ""]])
def test_invalid_words_of_a_checkpoint_are_refused_or_read(words):
    try:
        assert WordPieceTokenizer(words, 7, len(words))(["a"]).shape == (1, 7)
    except UserError as error:
        assert "the vocabulary in the model config" in str(error)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"model": 3}', b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_invalid_saved_tokenizer_is_named(saved, name, content):
    (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^[^\n]*{saved}[^\n]*$"):
        WordPieceTokenizer(str(saved), 7, len(WORDS))


CAPTIONS_OF_ANY_CHARACTERS = [
    "a \ud800 dog",
    "\udfff",
    "\ud83d\ude00",
    "\udcff\udc80",
    "\x00\x1b",
    "a\u200d\ufeff",
    "[UNK]" * 50,
]


@pytest.mark.parametrize("kind", ["WordPiece", "Chinese-CLIP", "CLIP", "Hugging Face", "canonicalize"])
def test_every_caption_is_tokenised(saved, kind):
    load = partial(load_tokenizer, HFTokenizer, str(saved), "")
    tokenizers = {
        "WordPiece": lambda: WordPieceTokenizer(WORDS, 7, len(WORDS)),
        "Chinese-CLIP": lambda: ChineseTokenizer(WORDS, 7, len(WORDS)),
        "CLIP": lambda: SimpleTokenizer(context_length=7),
        "Hugging Face": lambda: load(context_length=7),
        "canonicalize": lambda: load_tokenizer(
            HFTokenizer, str(saved), "", context_length=7, clean="canonicalize", strip_sep_token=True
        ),
    }
    tokens = tokenize(CAPTIONS_OF_ANY_CHARACTERS, tokenizers[kind]())
    assert tokens.ids.shape == (len(CAPTIONS_OF_ANY_CHARACTERS), 7) and (tokens.lengths >= 1).all()
