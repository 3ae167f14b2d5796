import pytest
from transformers import BertTokenizer

from clip_retrieval.data.captions import tokenize
from clip_retrieval.errors import UserError
from clip_retrieval.models.chinese_clip import ChineseTokenizer
from clip_retrieval.models.word_pieces import WordPieceTokenizer
from tests.models.small import WORDS

CAPTIONS = ["A red dogs thing", "cafés", "[SEP] a", "", "a a a a a a a a"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "words" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


def test_captions_become_lower_case_pieces_without_accents_between_cls_and_sep(vocabulary):
    for source in (vocabulary, vocabulary.parent):
        tokens = tokenize(CAPTIONS, WordPieceTokenizer(str(source), 7, len(WORDS)))
        assert tokens.ids.tolist() == [
            [2, 5, 7, 9, 10, 6, 3],
            [2, 11, 10, 3, 0, 0, 0],
            [2, 1, 1, 1, 5, 3, 0],  # spelled out, it is no special token
            [2, 3, 0, 0, 0, 0, 0],
            [2, 5, 5, 5, 5, 5, 3],  # cut, [SEP] kept
        ]
        assert (tokens.lengths.tolist(), tokens.cut) == ([7, 4, 6, 2, 7], 1)


@pytest.mark.parametrize("kind", [WordPieceTokenizer, ChineseTokenizer])
def test_the_words_alone_make_the_same_tokenizer(vocabulary, kind):
    tokenizer = kind(str(vocabulary), 7, len(WORDS))
    assert tokenizer.words == WORDS
    again = kind(tokenizer.words, 7, len(WORDS))
    assert tokenize(CAPTIONS, again).ids.tolist() == tokenize(CAPTIONS, tokenizer).ids.tolist()
    assert again(CAPTIONS).tolist() == tokenizer(CAPTIONS).tolist()


def test_a_vocabulary_of_another_size_is_refused(vocabulary):
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


def test_a_saved_tokenizer_is_read_without_a_network(vocabulary, saved, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network is asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    tokenizer = WordPieceTokenizer(str(saved), 7, len(WORDS))
    assert tokenizer.words == WORDS
    assert tokenizer(CAPTIONS).tolist() == WordPieceTokenizer(str(vocabulary), 7, len(WORDS))(CAPTIONS).tolist()


def test_a_broken_saved_tokenizer_is_named(saved):
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"the tokenizer .*saved cannot be read \(.*; give another --tokenizer"):
        WordPieceTokenizer(str(saved), 7, len(WORDS))


def test_a_vocabulary_whose_padding_the_towers_would_not_mask_is_refused(vocabulary):
    vocabulary.write_text("\n".join([*WORDS[1:], "[PAD]"]) + "\n")
    with pytest.raises(UserError, match=r"--tokenizer .*vocab.txt: \[PAD\] must be its first entry"):
        WordPieceTokenizer(str(vocabulary), 7, len(WORDS))


def test_a_cased_vocabulary_is_refused(vocabulary):
    (vocabulary.parent / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(UserError, match=r"tokenizer_config.json: its vocabulary is cased"):
        WordPieceTokenizer(str(vocabulary.parent), 7, len(WORDS))
