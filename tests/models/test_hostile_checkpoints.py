"""Checkpoints of ours with other values: a run resumes, or refuses them in one line that names the file."""

import copy
import math
import random

import pytest
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models.load import load_into, refuse_not_finite
from clip_retrieval.models.weights import read_text_tower, read_weights
from tests.models.small import small_clip, small_simple_clip
from tests.models.test_weights import jit_archive, our_checkpoint

OTHER_VALUES = [None, "x", "", -1, 0, 2**62, 1.5, math.nan, math.inf, [], {}, (), [1], {"x": 1}, {1: 2}, True, b"x"]
OTHER_VALUES += [complex(1, 2), torch.zeros(3), torch.tensor(1.0), torch.zeros(1).expand(1), [[["x"]]]]


@pytest.fixture
def last(run, arguments, tmp_path):
    """The last.pt of a run of two steps, and a function that resumes from any content: resume(content)."""
    command = [*arguments, "--max_steps", "2", "--no_eval_first"]
    assert run(*command)[0] == 0
    content = torch.load(tmp_path / "logs/ex0/last.pt", weights_only=True)

    def resume(changed, *extra):
        torch.save(changed, tmp_path / "changed.pt")
        rest = ("--experiments", "resumed", "--overwrite", "--resume", tmp_path / "changed.pt")
        code, _, err = run(*arguments, "--no_eval_first", "--max_steps", "3", *rest, *extra)
        lines = [line for line in err.splitlines() if not line.startswith("WARNING")]
        assert code == 0 or (code == 2 and len(lines) == 1), (code, err)
        return code, err

    return content, resume


def places(value, path=()):
    """Return the path of every nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, inner in items:
        yield (*path, name)
        yield from places(inner, (*path, name))


def change(content, path, value):
    """Replace the value at a path of `content`; "DELETED" deletes it."""
    name, *rest = path
    as_tuple = isinstance(content, tuple)
    content = list(content) if as_tuple else copy.copy(content)
    if rest:
        content[name] = change(content[name], rest, value)
    elif isinstance(value, str) and value == "DELETED":
        del content[name]
    else:
        content[name] = value
    return tuple(content) if as_tuple else content


def test_unchanged_checkpoint_resumes(last):
    content, resume = last
    assert resume(content)[0] == 0


@pytest.mark.slow
def test_mutated_checkpoint_resumes_or_is_refused(last):
    content, resume = last
    rng = random.Random(0)
    every = list(places(content))
    tensors = [path for path in every if path[0] == "model" or path[:2] == ("optimizer", "state")]
    others = [path for path in every if path not in set(tensors)]
    codes = []
    for _ in range(60):
        path = rng.choice(others if rng.random() < 0.8 else tensors)
        codes.append(resume(change(content, path, rng.choice([*OTHER_VALUES, "DELETED"])))[0])
    assert set(codes) == {0, 2}


def first_moment(content):
    return content["optimizer"]["state"][0]["exp_avg"]


@pytest.mark.parametrize(
    "value",
    [
        lambda moment: moment[:1],
        lambda moment: moment.reshape(-1),
        lambda moment: moment[None],
        lambda moment: torch.zeros(()),
        lambda moment: torch.zeros(0),
        lambda moment: moment.double(),
        lambda moment: moment.half(),
        lambda moment: moment.long(),
        lambda moment: torch.complex(moment, moment),
        lambda moment: torch.full_like(moment, math.nan),
        lambda moment: moment.to_sparse(),
        lambda moment: moment.to("meta"),
        lambda moment: torch.zeros(1).as_strided(moment.shape, [0] * moment.ndim),
    ],
)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_moments_of_another_shape_or_dtype_are_refused(last, name, value):
    content, resume = last
    code, err = resume(change(content, ("optimizer", "state", 0, name), value(first_moment(content))))
    assert code == 2 and "changed.pt" in err


def test_moments_in_another_layout_resume_identically(last, tmp_path):
    content, resume = last
    assert resume(content)[0] == 0
    expected = torch.load(tmp_path / "logs/resumed/last.pt", weights_only=True)
    for number, state in content["optimizer"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].ndim == 2:
                content = change(content, ("optimizer", "state", number, name), state[name].t().contiguous().t())
    assert resume(content)[0] == 0
    found = torch.load(tmp_path / "logs/resumed/last.pt", weights_only=True)
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())


@pytest.mark.parametrize(
    "path, value",
    [
        (("optimizer", "state", 0, "step"), torch.zeros(2)),
        (("optimizer", "state", 0, "step"), torch.tensor(2)),
        (("optimizer", "state", 0, "step"), torch.tensor(math.nan)),
        (("optimizer", "state", 0, "step"), torch.tensor(-1.0)),
        (("optimizer", "state", 0, "max_exp_avg_sq"), torch.zeros(2)),
        (("optimizer", "state", 0, "exp_avg"), "DELETED"),
        (("optimizer", "state", 10**6), {}),
        (("optimizer", "state", -1), {}),
        (("optimizer", "param_groups", 0, "params"), [0]),
        (("optimizer", "param_groups", 0, "params", 0), 1),
        (("optimizer", "param_groups"), []),
        (("learning", "logit_scale"), [2]),
        (("scaler", "scale"), -1.0),
        (("progress", "best"), {"step": 1, "epoch": 1, "block": {}}),
        (("progress", "before"), {"split": "test"}),
        (("progress", "step"), -1),
        (("sampler", "data"), "DELETED"),
        (("model", "visual.proj"), torch.full((32, 24), math.nan)),
        (("model", "visual.proj"), torch.zeros(24, 32)),
        (("model", "visual.proj"), "DELETED"),
        (("model_config", "vision_cfg"), "DELETED"),
        (("model_config", "text_cfg"), "DELETED"),
        (("preprocess", "mean"), ["a", "b", "c"]),
        (("preprocess", "resize_mode"), "crop"),
        (("options", "dataset"), ()),
        (("options", "lr"), "fast"),
        (("options", "recall_k"), (1, "5")),
        (("options", "vision_model"), None),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_invalid_checkpoint_value_is_refused(last, path, value):
    content, resume = last
    code, err = resume(change(content, path, value))
    assert code == 2 and "changed.pt" in err, err


def test_fields_of_a_newer_version_are_skipped(last):
    content, resume = last
    content = change(content, ("progress", "invented"), {"a": [1]})
    content = change(content, ("options", "invented"), 3)
    assert resume(change(content, ("invented",), "x"))[0] == 0


def not_finite(state, value=math.nan):
    name = next(name for name in state if state[name].is_floating_point() and state[name].numel() > 1)
    return state | {name: torch.full_like(state[name], value)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["bare", "half", "openai", "ours"])
def test_weights_that_are_not_finite_are_named(tmp_path, layout, value):
    clip, path = small_clip(), tmp_path / "weights.pt"
    state = not_finite(clip.state_dict(), value)
    clip.load_state_dict(state)
    if layout == "openai":
        jit_archive(clip, path)
    else:
        state = {name: v.half() for name, v in state.items()} if layout == "half" else state
        torch.save(our_checkpoint(clip) if layout == "ours" else state, path)
    with pytest.raises(UserError, match=r"weights.pt: positional_embedding is not finite"):
        load_into(small_clip(), read_weights(path).state, str(path), "small")


def test_nan_under_both_names_of_the_weights_is_named(last):
    content, resume = last
    state = not_finite(content["model"])
    code, err = resume(content | {"model": state, "state_dict": dict(state)})[:2]
    assert code == 2 and "not finite" in str(err) and "differs" not in str(err)


def test_number_beyond_float32_is_not_finite(tmp_path):
    state = small_clip().state_dict()
    torch.save(state | {"visual.proj": state["visual.proj"].double() + 1e300}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"visual.proj is not finite"):
        load_into(small_clip(), read_weights(tmp_path / "weights.pt").state, "weights.pt", "small")


def test_obsolete_buffers_may_be_infinite(tmp_path):
    state = small_clip().state_dict() | {"attn_mask": torch.full((16, 16), -math.inf)}
    load_into(small_clip(), state, "weights.pt", "small")
    refuse_not_finite({"count": torch.tensor(3), "none": torch.empty(0)}, "weights.pt")


@pytest.mark.parametrize("command", [("--eval",), ()])
def test_nan_weights_stop_eval_and_finetune_at_the_start(run, arguments, tmp_path, command):
    torch.save(not_finite(small_clip().state_dict()), tmp_path / "nan.pt")
    code, _, err = run(*arguments, "--pretrained", tmp_path / "nan.pt", *command)
    assert code == 2 and "nan.pt: positional_embedding is not finite" in err
    assert not (tmp_path / "logs/ex0/last.pt").exists()


def test_text_tower_weights_that_are_not_finite_are_named(tmp_path):
    from clip_retrieval.models.build import build_model
    from clip_retrieval.models.simple_clip_weights import distilbert_weights
    from clip_retrieval.options import ModelOptions
    from tests.models.small import small_simple_config
    from tests.models.test_config_values import write_config

    tower = small_simple_clip().text.transformer.state_dict()
    torch.save(not_finite(tower), tmp_path / "text.bin")
    config = small_simple_config()
    assert read_text_tower(
        str(tmp_path / "text.bin"), distilbert_weights, "DistilBERT", config["text_cfg"]["hf_config"]
    )
    path = write_config(tmp_path, config)
    with pytest.raises(UserError, match=r"text.bin for captions: text.transformer\S* is not finite"):
        build_model(ModelOptions(vision_model=str(path), text_pretrained=str(tmp_path / "text.bin")))


def test_adaptor_of_another_shape_is_refused(run, arguments, tmp_path):
    state = small_clip().state_dict()
    torch.save(
        our_checkpoint(small_clip()) | {"model": state | {"adaptor.0.weight": torch.zeros(3)}}, tmp_path / "a.pt"
    )
    code, _, err = run(*arguments, "--pretrained", tmp_path / "a.pt", "--eval")
    assert code == 2 and "a.pt does not fit: its adaptor" in err


def test_best_checkpoint_of_another_model_is_named(run, arguments, tmp_path):
    command = [*arguments, "--max_steps", "2", "--no_eval_first"]
    assert run(*command)[0] == 0
    folder = tmp_path / "logs/ex0"
    best = torch.load(folder / "best.pt", weights_only=True)
    best["model"]["visual.proj"] = best["state_dict"]["visual.proj"] = torch.zeros(3, 3)
    torch.save(best, folder / "best.pt")
    code, _, err = run(*command, "--resume", "auto")
    assert code == 2 and "best.pt holds the weights of another model" in err
