"""--negative_column in a run: the captions that the loss receives, chunks, frozen towers, resume."""

import pytest
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.run.merge import settle
from clip_retrieval.training import distillation
from clip_retrieval.training.trainer import Trainer
from tests.test_resume import assert_same_ending


@pytest.fixture
def command(arguments, negated):
    """The arguments of a run with negative captions."""
    return [*arguments, "--annotations", negated, "--negative_column", "wrong", "--no_eval_first"]


@pytest.fixture
def seen(monkeypatch):
    """The batch, step, and features of the loss in each step, as a list."""
    found, step = [], Trainer.step

    def keep(self, batch, number, rate):
        result = step(self, batch, number, rate)
        found.append((batch, result, {name: p.detach().clone() for name, p in self.model.named_parameters()}))
        return result

    monkeypatch.setattr(Trainer, "step", keep)
    return found


def test_loss_receives_the_captions_and_then_the_negative_ones(run, command, seen, monkeypatch):
    code, out, err = run(*command, "--max_steps", "4")
    assert code == 0, err
    assert "14 images, 35 captions" in out and "negative captions" in out
    for batch, result, _ in seen:
        assert batch.images.shape[0] == 10 and batch.texts.shape[0] == 20
        # every pair is a positive; the negative captions are none
        assert set(range(10)) == set(batch.positives[:, 1].tolist())
        assert batch.text_rows[:10].tolist() == list(range(0, 20, 2))
        negatives = batch.text_rows[10:]
        assert (negatives % 2 == 1).all() and 0 < len(negatives) <= 10
        assert len(result.text_features) == 10 + len(negatives)
        # a negative caption differs from its caption; a missing one repeats it
        differs = (batch.texts[0::2] != batch.texts[1::2]).any(1)
        assert differs.nonzero()[:, 0].tolist() == ((negatives - 1) // 2).tolist()
        assert 0 <= result.accuracy()[1] <= 100
    # another negative caption is drawn in another epoch, or with another negative in the list
    drawn = {tuple(row) for batch, *_ in seen for row in batch.texts[1::2].tolist()}
    assert len(drawn) > 10


def test_accuracy_has_no_queries_of_negative_captions(run, command, seen):
    assert run(*command, "--max_steps", "2")[0] == 0
    _, result, _ = seen[0]
    cosines = result.image_features @ result.text_features.T
    hit = torch.zeros_like(cosines, dtype=torch.bool)
    hit[tuple(result.positives.T)] = True
    i2t = hit.gather(1, cosines.argmax(1)[:, None]).float().mean().item()
    t2i = hit.gather(0, cosines.argmax(0)[None])[0, :10].float().mean().item()
    assert result.accuracy() == pytest.approx((100 * i2t, 100 * t2i))


@pytest.mark.parametrize("loss", ["infonce", "siglip", "margin", "triplet"])
def test_chunks_and_distillation_give_the_weights_of_the_whole_batch(run, command, seen, loss):
    extra = ["--loss", loss, "--max_steps", "2", "--eps", "1", "--lr", "0.1", "--distill_from", "start"]
    for chunks in ((), ("--grad_cache", "3")):
        code, _, err = run(*command, *extra, "--overwrite", *chunks)
        assert code == 0, err
    for name, weight in seen[1][2].items():
        torch.testing.assert_close(seen[3][2][name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("cache", [(), ("--no_feature_cache",)])
def test_feature_distillation_is_of_the_captions(run, command, seen, monkeypatch, cache):
    losses, compute = [], distillation.feature_distillation

    def keep(student, teacher, processes):
        losses.append(([len(side) for side in student], compute(student, teacher, processes).item()))
        return compute(student, teacher, processes)

    monkeypatch.setattr(distillation, "feature_distillation", keep)
    extra = ["--distill_from", "start", "--distill_kind", "feature", "--max_steps", "4", "--lr", "0.1", "--warmup", "0"]
    assert run(*command, *extra, *cache)[0] == 0
    assert all(lengths == [10, 10] for lengths, _ in losses) and losses[-1][1] > 0
    assert all(len(result.text_features) > 10 for _, result, _ in seen)


def test_features_of_a_frozen_text_tower_are_those_of_the_ids(run, command, seen):
    for cache in ((), ("--no_feature_cache",)):
        assert run(*command, "--freeze_text", "--max_steps", "2", "--overwrite", *cache)[0] == 0
    assert seen[0][0].texts.is_floating_point() and not seen[2][0].texts.is_floating_point()
    for (_, cached, _), (_, encoded, _) in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(cached.text_features, encoded.text_features)


def test_prefix_and_word_dropout_apply_to_them(run, command, seen):
    for extra in ((), ("--caption_prefix", "red", "--word_dropout", "0.4")):
        assert run(*command, "--max_steps", "1", "--overwrite", *extra)[0] == 0
    plain, changed = (batch.texts[1::2] for batch, *_ in seen)
    assert len({row[1] for row in changed.tolist()}) > 1 and len(set(plain[:, 1].tolist())) == 1
    assert (changed != 0).sum() < (plain != 0).sum()


@pytest.mark.parametrize("extra", [(), ("--hard_negatives", "0.5", "--grad_cache", "4")], ids=" ".join)
def test_resume_with_negatives_is_bit_identical(run, run_killed, command, tmp_path, extra):
    command = [*command, "--save_every", "1", *extra]
    assert run(*command, "--experiments", "whole")[0] == 0
    run_killed(3, *command, "--resume", "auto")
    code, _, err = run(*command, "--resume", "auto")
    assert code == 0, err
    assert_same_ending(tmp_path / "logs" / "whole", tmp_path / "logs" / "ex0")


def test_resume_with_other_negatives_is_refused(run, run_killed, command):
    run_killed(3, *command, "--save_every", "1")
    place = command.index("--negative_column")
    code, _, err = run(*command[:place], *command[place + 2 :], "--resume", "auto", "--negative_column", "image")
    assert code == 2 and "was trained on other data" in err


def test_evaluation_ignores_them(run, command, tmp_path, negated):
    assert run(*command, "--max_steps", "2")[0] == 0
    text = negated.read_text()
    try:
        negated.write_text(text.replace("wrong", "other", 1))
        code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/best.pt", "--device", "cpu")
    finally:
        negated.write_text(text)
    assert code == 0, err


def test_one_data_set_of_a_mixture_needs_them(run, command, captioned, seen):
    both = ["--dataset", "csv", "--dataset_root", captioned, "--annotations", captioned / "captions.csv"]
    code, _, err = run(*command, *both, "--max_steps", "1")
    assert code == 0, err
    assert 10 < len(seen[0][1].text_features) < 20


def test_train_split_without_any_is_refused(run, command):
    code, _, err = run(*command, "--negative_column", "other")
    assert code == 2
    assert "no negative caption in other; name their column or key with --negative_column" in err


def test_data_without_such_a_column_is_refused():
    with pytest.raises(UserError, match="--negative_column is for --dataset csv and karpathy, not coco; add"):
        settle({"dataset": "coco", "negative_column": "wrong"})
    assert settle({"negative_column": "wrong"}, {"dataset": "coco", "negative_column": None})
