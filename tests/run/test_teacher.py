"""The teacher of --distill_from, from the command line."""

import pytest
import torch

from clip_retrieval.losses import distillation
from clip_retrieval.training.distillation import Distillation
from tests.conftest import read_lines

FEW = ("--max_steps", "3", "--no_eval_first", "--display", "1")


@pytest.fixture
def losses(monkeypatch):
    """The distillation losses of the steps, without weight."""
    found = []
    for name in ("relational", "feature"):
        function = getattr(distillation, f"{name}_distillation")

        def record(*arguments, function=function):
            found.append(function(*arguments))
            return found[-1]

        monkeypatch.setattr(f"clip_retrieval.training.distillation.{name}_distillation", record)
    return found


@pytest.mark.parametrize("kind", ["relational", "feature"])
def test_distillation_from_the_start_is_zero_at_first_and_then_not(run, arguments, losses, tmp_path, kind):
    code, _, err = run(*arguments, *FEW, "--distill_from", "start", "--distill_kind", kind)
    assert code == 0, err
    assert abs(losses[0]) < 1e-6 and losses[1] > 1e-6 and losses[2] > 1e-6
    assert (tmp_path / "logs/ex0/start.pt").is_file()


def test_large_weight_keeps_the_features(run, arguments, losses):
    assert run(*arguments, *FEW, "--distill_from", "start", "--experiments", "light")[0] == 0
    assert run(*arguments, *FEW, "--distill_from", "start", "--distill_weight", "100")[0] == 0
    assert losses[5] < losses[2]


def test_teacher_from_a_checkpoint_is_that_model(run, arguments, losses, tmp_path, monkeypatch):
    teachers, normal = [], Distillation.__init__

    def keep(self, teacher, *others):
        teachers.append({name: value.clone() for name, value in teacher.weights().items()})
        normal(self, teacher, *others)

    monkeypatch.setattr(Distillation, "__init__", keep)
    assert run(*arguments, *FEW, "--experiments", "teacher")[0] == 0
    path = tmp_path / "logs/teacher/last.pt"
    code, _, err = run(*arguments, *FEW, "--seed", "5", "--distill_from", path)
    assert code == 0, err
    stored = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(value, stored[name]) for name, value in teachers[0].items())
    train = [line["loss"] for line in read_lines(tmp_path / "logs/ex0/metrics.jsonl") if line["kind"] == "train"]
    assert losses[0] > 1e-6 and all(loss > 0 for loss in train)


@pytest.mark.parametrize(
    "extra",
    [
        ("--distill_kind", "feature", "--grad_cache", "4"),
        ("--freeze_vision",),
        ("--caption_sampling", "one", "--start_image_size", "8", "--batch_size", "7"),
    ],
    ids=" ".join,
)
def test_cached_features_of_the_teacher_give_the_same_weights(run, arguments, tmp_path, extra, monkeypatch):
    seen, normal = [], Distillation.__init__

    def count(self, teacher, *others):
        encode = teacher.encode_image
        monkeypatch.setattr(teacher, "encode_image", lambda images: seen.append(len(images)) or encode(images))
        normal(self, teacher, *others)

    monkeypatch.setattr(Distillation, "__init__", count)
    command = [*arguments, "--eps", "1e-3", "--no_eval_first", "--distill_from", "start", *extra]
    weights, images = [], []
    for name, plain in (("plain", ["--no_feature_cache"]), ("cached", [])):
        code, out, err = run(*command, *plain, "--experiments", name)
        assert code == 0, err
        assert ("the teacher encodes all images and captions once" in out) == (not plain)
        weights.append(torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)["model"])
        images.append(sum(seen))
        seen.clear()
    assert images[1] == 14 < images[0]  # the images of the train split
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "extra",
    [("--augment", "crop"), ("--word_dropout", "0.3"), ("--skip_broken",), ("--max_steps", "2")],
    ids=" ".join,
)
def test_teacher_of_random_inputs_or_few_steps_sees_each_batch(run, arguments, losses, extra):
    code, out, err = run(*arguments, "--no_eval_first", "--distill_from", "start", *extra)
    assert code == 0 and "encodes all" not in out, err
    assert len(losses) >= 2


def test_missing_start_file_is_named_on_resume(run, run_killed, arguments, tmp_path):
    command = [*arguments, "--distill_from", "start", "--save_every", "2", "--resume", "auto"]
    run_killed(4, *command)
    (tmp_path / "logs/ex0/start.pt").unlink()
    code, _, err = run(*command)
    assert code == 2 and "start.pt: no such file" in err


def test_start_file_moves_with_a_run_that_resumes_elsewhere(run, run_killed, arguments, tmp_path):
    command = [*arguments, "--distill_from", "start", "--save_every", "2"]
    run_killed(4, *command)
    code, _, err = run(*command, "--resume", tmp_path / "logs/ex0/last.pt", "--experiments", "ex1")
    assert code == 0, err
    start = [torch.load(tmp_path / f"logs/{name}/start.pt", weights_only=True)["model"] for name in ("ex0", "ex1")]
    assert all(torch.equal(value, start[1][name]) for name, value in start[0].items())


def test_teachers_of_other_inputs_are_refused(run, arguments, tmp_path):
    code, _, err = run(*arguments, *FEW, "--distill_from", "nothing.pt")
    assert code == 2 and "--distill_from nothing.pt: no such file" in err
    assert run(*arguments, *FEW, "--image_size", "32", "--experiments", "large")[0] == 0
    code, _, err = run(*arguments, *FEW, "--distill_from", tmp_path / "logs/large/last.pt")
    assert code == 2 and "another size" in err
    assert run(*arguments, *FEW, "--context_length", "12", "--experiments", "short")[0] == 0
    code, _, err = run(*arguments, *FEW, "--distill_from", tmp_path / "logs/short/last.pt")
    assert code == 2 and "context length" in err
