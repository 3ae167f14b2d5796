"""Checkpoints of a run hold its tokenizer's vocabulary: reading them needs neither vocab.txt nor network."""

import json
import shutil

import pytest
import torch

from clip_retrieval.export.export import export
from tests.conftest import read_json
from tests.models.small import small_simple_config
from tests.models.test_chinese_clip import checkpoint as chinese_checkpoint


@pytest.fixture
def words(captioned, tmp_path):
    """A copy of the vocabulary that the test may delete."""
    return shutil.copy(captioned / "vocab.txt", tmp_path / "vocab.txt")


@pytest.fixture
def finetune(run, arguments, tmp_path, words, captioned):
    """finetune(*model arguments): train three steps with this vocabulary, then delete it."""

    def finetune_with(*model):
        at = arguments.index("--vision_model")
        rest = arguments[:at] + arguments[at + 2 :]
        code, _, err = run(*rest, *model, "--tokenizer", words, "--max_steps", 3, "--image_size", 32)
        assert code == 0, err
        (tmp_path / "vocab.txt").unlink()
        return tmp_path / "logs" / "ex0"

    return finetune_with


def of_simple_clip(tmp_path):
    size = len((tmp_path / "vocab.txt").read_text().split())
    (tmp_path / "simple.json").write_text(json.dumps(small_simple_config(size)))
    return "--vision_model", tmp_path / "simple.json"


def of_chinese_clip(tmp_path):
    size = len((tmp_path / "vocab.txt").read_text().split())
    return "--pretrained", chinese_checkpoint(tmp_path, vocabulary=size)


@pytest.mark.parametrize("model", [of_simple_clip, of_chinese_clip])
def test_checkpoint_is_evaluated_and_resumed_without_the_vocabulary(finetune, run, tmp_path, model, no_network):
    folder = finetune(*model(tmp_path))
    result = read_json(folder / "results.json")
    code, _, err = run("--eval", "--resume", folder / "best.pt")
    assert code == 0, err
    again = read_json(folder / "eval_csv_test" / "results.json")
    assert (again["i2t"], again["t2i"]) == (result["i2t"], result["t2i"])
    code, _, err = run("--resume", folder / "last.pt", "--max_steps", 4, "--checkpoint_path", folder.parent)
    assert code == 0, err
    last = torch.load(folder / "last.pt", weights_only=True)
    assert last["step"] == 4 and last["model_config"]["text_cfg"]["vocab"][:3] == ["[PAD]", "[UNK]", "[CLS]"]
    # a resumed run keeps the vocabulary
    code, _, err = run("--eval", "--resume", folder / "last.pt", "--overwrite")
    assert code == 0, err


def test_typed_tokenizer_takes_precedence(finetune, run, tmp_path, captioned, no_network):
    folder = finetune(*of_simple_clip(tmp_path))
    (tmp_path / "few.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    code, _, err = run("--eval", "--resume", folder / "best.pt", "--tokenizer", tmp_path / "few.txt")
    assert code == 2 and "few.txt has 6 entries, the text tower 17" in err
    code, _, err = run("--eval", "--resume", folder / "best.pt", "--tokenizer", captioned / "vocab.txt")
    assert code == 0, err


def test_checkpoint_without_a_vocabulary_asks_for_one(finetune, run, tmp_path, captioned, no_network):
    folder = finetune(*of_simple_clip(tmp_path))
    content = torch.load(folder / "best.pt", weights_only=True)
    del content["model_config"]["text_cfg"]["vocab"]
    torch.save(content, folder / "best.pt")
    code, _, err = run("--eval", "--resume", folder / "best.pt")
    assert code == 2 and "vocab.txt: no such file" in err
    code, _, err = run("--eval", "--resume", folder / "best.pt", "--tokenizer", captioned / "vocab.txt")
    assert code == 0, err


def test_chinese_clip_with_a_vocabulary_is_exported(finetune, tmp_path):
    folder = finetune(*of_chinese_clip(tmp_path))
    export(folder / "best.pt", tmp_path / "exported.pt", "chinese_clip")
    assert "module.bert.embeddings.word_embeddings.weight" in torch.load(tmp_path / "exported.pt")["state_dict"]
