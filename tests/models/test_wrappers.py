"""Weights are found under any holders and prefixes, and other models' names stay as they are."""

import itertools
import random

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from clip_retrieval.errors import UserError
from clip_retrieval.models import chinese_clip
from clip_retrieval.models.chinese_clip import bert_to_open_clip
from clip_retrieval.models.weights import read_text_tower, read_weights
from clip_retrieval.models.wrappers import find_states
from tests.models.small import small_clip, small_simple_clip

PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "clip.",
    "net.",
    "base_model.model.",
    "_fsdp_wrapped_module.",
    "student.",
]
HOLDERS = ["state_dict", "model", "model_state_dict", "module", "ema", "model_ema", "state_dict_ema", "params"]
STATE = small_clip(seed=1).state_dict()
OTHER = small_clip(seed=2).state_dict()
SIZES = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(16), "vocab_size": torch.tensor(49408)}


def prefixed(state, *prefixes):
    return {"".join(prefixes) + name: value for name, value in state.items()}


def read(content, tmp_path, key=None):
    torch.save(content, tmp_path / "w.pt")
    return read_weights(tmp_path / "w.pt", key).state


def is_same(state, expected=STATE):
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("first, second", itertools.product(PREFIXES, PREFIXES))
def test_two_prefixes_in_any_order(first, second, tmp_path):
    assert is_same(read({"state_dict": prefixed(STATE, first, second)}, tmp_path))


@pytest.mark.parametrize("seed", range(20))
def test_holders_and_prefixes_in_any_nesting(seed, tmp_path):
    chance = random.Random(seed)
    content = prefixed(STATE | SIZES, *chance.sample(PREFIXES, chance.randint(0, 3)))
    for holder in chance.sample(HOLDERS, chance.randint(0, 4)):
        content = {holder: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    assert is_same(read(content, tmp_path))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("visual.", "visual._orig_mod."),
        lambda name: name.replace("visual.", "visual.module."),
        lambda name: name.replace("visual.", "visual._orig_mod.module."),
        lambda name: name.replace("resblocks.0.", "resblocks.0._orig_mod."),
        lambda name: name.replace("resblocks.1.", "_checkpoint_wrapped_module.resblocks.1._fsdp_wrapped_module."),
    ],
)
def test_prefixes_inside_names(rename, tmp_path):
    assert is_same(read({"state_dict": {"model." + rename(name): v for name, v in STATE.items()}}, tmp_path))


def test_averaged_model_of_torch(tmp_path):
    assert is_same(read(AveragedModel(small_clip(seed=1)).state_dict(), tmp_path))


def test_sizes_in_a_state_dict_are_not_weights(tmp_path):
    assert is_same(read({"epoch": 1, "model_state_dict": STATE | SIZES}, tmp_path))


CUSTOM = small_clip(custom_text=True).state_dict()
SIMPLE = small_simple_clip().state_dict()


@pytest.mark.parametrize("state", [CUSTOM, SIMPLE, STATE | {"visual.trunk.stages.0.module.conv.weight": torch.ones(2)}])
@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_names_that_look_wrapped_are_kept(state, prefix, tmp_path):
    assert is_same(read({"state_dict": prefixed(state, prefix)}, tmp_path), state)


def test_wrapped_weights_of_other_systems(tmp_path, chinese):
    reference = {name.removeprefix("module."): v for name, v in chinese_clip.to_reference(chinese).items()}
    assert is_same(read({"state_dict": prefixed(reference, "model._orig_mod.module.")}, tmp_path), chinese)
    bert = {name: v for name, v in reference.items() if name.startswith("bert.")}
    expected = bert_to_open_clip(bert)
    assert expected
    for content in (bert, prefixed(bert, "model."), {"model": prefixed(reference, "module.")}):
        torch.save(content, tmp_path / "bert.bin")
        assert is_same(read_text_tower(str(tmp_path / "bert.bin"), bert_to_open_clip, "BERT", {}), expected)


@pytest.fixture
def chinese():
    """A state dict with open_clip's names of a Chinese-CLIP, of a few tensors."""
    names = ["embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.bias"]
    state = {f"text.transformer.{name}": torch.rand(3, 2) for name in names}
    return state | {"visual.conv1.weight": torch.rand(4), "text.proj.weight": torch.rand(2, 3)}


AVERAGED = {
    "timm": {"state_dict": STATE, "state_dict_ema": OTHER},
    "deit": {"model": STATE, "model_ema": prefixed(OTHER, "module."), "epoch": 1},
    "nested": {"ema": {"module": OTHER, "decay": 0.99}, "model": prefixed(STATE, "module.")},
    "lightning": {"state_dict": prefixed(STATE, "model.") | prefixed(OTHER, "model_ema.module.")},
    "beside": STATE | prefixed(OTHER, "ema_model."),
    "held and beside": {"state_dict": STATE | prefixed(OTHER, "ema_model.")},
    "averaged model": {"model": STATE, "swa_model": {"n_averaged": torch.tensor(3), **prefixed(OTHER, "module.")}},
}
RAW_KEYS = dict(
    zip(AVERAGED, ["state_dict", "model", "model", "state_dict.model", ".", "state_dict", "model"], strict=True)
)


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_are_taken_and_the_log_names_the_others(kind, tmp_path, caplog):
    assert is_same(read(AVERAGED[kind], tmp_path), OTHER)
    assert "(averaged)" in caplog.text
    assert f"--pretrained_key takes another one: {RAW_KEYS[kind]}" in caplog.text
    assert is_same(read(AVERAGED[kind], tmp_path, RAW_KEYS[kind]))


def test_first_of_several_models_is_taken(tmp_path, caplog):
    content = prefixed(STATE, "student.") | prefixed(OTHER, "teacher.")
    assert is_same(read(content, tmp_path)) and "another one: teacher" in caplog.text
    assert is_same(read(content, tmp_path, "teacher"), OTHER)


def test_unknown_key_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"--pretrained_key wrong: .*choose from model_ema.module, model$"):
        read(AVERAGED["deit"], tmp_path, "wrong")


def test_tensors_beside_the_model_are_named(tmp_path, caplog):
    assert is_same(read({"state_dict": {**prefixed(STATE, "model."), "adapter.weight": torch.ones(2)}}, tmp_path))
    assert "tensors beside the model are not used: adapter.weight" in caplog.text


def test_optimizer_state_by_name_is_not_a_model(tmp_path, caplog):
    optimizer = {"state": {f"visual.{n}": {"visual.exp_avg": torch.ones(2)} for n in range(3)}}
    assert is_same(read({"optimizer": optimizer, "optim_state_dict": prefixed(STATE, "x."), "model": STATE}, tmp_path))
    assert not caplog.text


def test_dict_that_holds_itself_ends_the_search():
    inner = {"visual.x": torch.ones(1)}
    inner["inner"] = {"again": inner}
    deep = inner
    for _ in range(10_000):
        deep = {"deeper": deep}
    content = {"a": inner, "deep": deep, **{str(n): {} for n in range(5000)}}
    assert [each.key for each in find_states(content, lambda state: "visual.x" in state)] == ["a"]


def test_pretrained_key_chooses_the_weights_of_an_evaluation(run, arguments, tmp_path):
    broken = {name: v * float("nan") for name, v in OTHER.items()}
    torch.save({"state_dict": STATE, "state_dict_ema": broken}, tmp_path / "w.pt")
    command = [*arguments, "--pretrained", tmp_path / "w.pt", "--eval"]
    code, _, err = run(*command)
    assert code == 2 and "not finite" in err
    assert run(*command, "--pretrained_key", "state_dict")[0] == 0
    code, _, err = run(*arguments, "--pretrained_key", "ema", "--pretrained", "none")
    assert code == 2 and "--pretrained_key ema needs a file as --pretrained" in err
