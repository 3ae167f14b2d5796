"""--hard_negatives in a run: order from the weights, resume within an epoch, frozen towers, refusals."""

import re

import pytest
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.run.merge import settle
from clip_retrieval.training import hard_negatives
from clip_retrieval.training.hard_negatives import HardNegatives, find_nearest
from tests.test_resume import assert_same_ending

HARD = ("--hard_negatives", "0.5", "--augment", "crop", "--save_every", "1", "--no_eval_first")


@pytest.fixture
def orders(monkeypatch):
    """The order of each epoch that runs compose, as (epoch, batches)."""
    found, compose = [], HardNegatives.compose

    def keep(self, epoch):
        order = compose(self, epoch)
        found.append((epoch, order.tolist()))
        return order

    monkeypatch.setattr(HardNegatives, "compose", keep)
    return found


@pytest.mark.parametrize("tile", [1, 40, 10**6])
def test_nearest_are_those_of_float64(monkeypatch, tile):
    monkeypatch.setitem(hard_negatives.TILE, "cpu", tile)
    features = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    scores = features.double() @ features.double().T
    scores.fill_diagonal_(-2)
    assert torch.equal(find_nearest(features, 5), scores.argsort(dim=1, descending=True)[:, :5].int())
    assert find_nearest(features[:1], 5).tolist() == [[0]]


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--hard_negatives_by", "text", "--grad_cache", "4"),
        ("--caption_sampling", "one", "--batch_size", "4", "--precision", "bf16"),
        ("--trainable", "lora", "--lora_dropout", "0.2", "--word_dropout", "0.3"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("killed_in_step", [3, 4, 6])
def test_resume_within_an_epoch_is_bit_identical(run, run_killed, arguments, tmp_path, orders, extra, killed_in_step):
    command = [*arguments, *HARD, *extra]
    assert run(*command, "--experiments", "whole")[0] == 0
    whole = list(orders)
    run_killed(killed_in_step, *command, "--resume", "auto")
    code, _, err = run(*command, "--resume", "auto")
    assert code == 0, err
    assert_same_ending(tmp_path / "logs" / "whole", tmp_path / "logs" / "ex0")
    again = orders[len(whole) :]
    assert all(order in whole for order in again) and len(again) == (3 if killed_in_step == 4 else 2)


def test_an_epoch_has_its_random_pairs_in_another_order(run, arguments, orders, monkeypatch):
    random, compose = [], HardNegatives.compose
    monkeypatch.setattr(
        HardNegatives, "compose", lambda self, epoch: random.append(self.sampler.draw(epoch)) or compose(self, epoch)
    )
    code, out, err = run(*arguments, *HARD)
    assert code == 0, err
    assert [epoch for epoch, _ in orders] == [0, 1]
    for (_, batches), drawn in zip(orders, random, strict=True):
        assert batches != drawn.tolist()
        assert sorted(pair for batch in batches for pair in batch) == sorted(drawn.ravel().tolist())
    assert re.search(r"epoch 2: [1-4]\d\.\d% of the pairs are hard negatives, by image", out)


@pytest.mark.parametrize("by", ["image", "text"])
def test_cached_features_of_a_frozen_tower_give_the_same_order(run, arguments, orders, by):
    frozen = "--freeze_vision" if by == "image" else "--freeze_text"
    command = [*arguments, "--hard_negatives", "0.4", "--hard_negatives_by", by, frozen, "--no_eval_first"]
    assert run(*command, "--experiments", "cached")[0] == 0
    assert run(*command, "--no_feature_cache", "--experiments", "encoded")[0] == 0
    assert orders[:2] == orders[2:]


def test_a_cache_of_images_gives_the_same_order(run, arguments, tmp_path, orders):
    for extra in ((), ("--image_cache", tmp_path / "cache")):
        assert run(*arguments, *HARD, "--overwrite", "--max_steps", "3", *extra)[0] == 0
    assert orders[0] == orders[1]


def test_a_mixture_with_weights_trains(run, arguments, captioned, orders):
    both = ("--dataset", "csv", "--dataset_root", captioned, "--dataset_weights", "1", "2")
    code, _, err = run(*arguments[4:], *arguments[:4], *both, *HARD, "--max_steps", "4")
    assert code == 0, err
    assert orders


def test_an_unreadable_image_of_a_mixture_is_skipped(run, arguments, tmp_path, orders):
    (tmp_path / "other").mkdir()
    lines = ["image,caption,split"]
    for number in range(3):  # of the same size, so that their bytes are compared
        (tmp_path / f"other/{number}.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
        lines.append(f"{number}.jpg,broken thing {number},train")
    (tmp_path / "other/captions.csv").write_text("\n".join(lines) + "\n")
    both = [*arguments, "--dataset", "csv", "--dataset_root", tmp_path / "other", *HARD, "--max_steps", "3"]
    code, _, err = run(*both)
    assert code == 2 and "not a readable image" in err
    code, out, err = run(*both, "--skip_broken")
    assert code == 0, err
    assert len(orders) == 1 and "not a readable image" in out + err


def test_order_of_a_damaged_checkpoint_is_refused(run, run_killed, arguments, tmp_path):
    run_killed(3, *arguments, *HARD)
    path = tmp_path / "logs/ex0/last.pt"
    last = torch.load(path, weights_only=True)
    assert last["sampler"]["order"].shape == (3, 10)
    last["sampler"]["order"][0, 0] = 35
    torch.save(last, path)
    code, _, err = run(*arguments, *HARD, "--resume", path)
    assert code == 2 and "lacks the order of its epoch" in err
    assert run(*arguments, *HARD, "--resume", path, "--reset_data_offset")[0] == 0


def test_resume_with_another_share_is_refused(run, run_killed, arguments, tmp_path):
    run_killed(3, *arguments, *HARD)
    code, _, err = run(*arguments, *HARD, "--hard_negatives", "0.2", "--resume", "auto")
    assert code == 2 and "was trained with --hard_negatives 0.5" in err


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--hard_negatives_by", "text"), "--hard_negatives_by text needs --hard_negatives SHARE"),
        (("--hard_negatives", "1.5"), "--hard_negatives 1.5: must be at most 1"),
    ],
    ids=" ".join,
)
def test_unfit_options_are_refused(run, arguments, extra, message):
    code, _, err = run(*arguments, *extra)
    assert code == 2 and message in err


def test_streamed_data_is_refused():
    with pytest.raises(UserError, match="--hard_negatives is not for --dataset webdataset, whose pairs are streamed"):
        settle({"dataset": "webdataset", "hard_negatives": 0.5})
