"""Resolution warm-up: the first steps see reduced images, exactly to the step of the switch; a teacher never does."""

import numpy as np
import pytest
import torch
from PIL import Image

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.models.any_size import accept_smaller_images
from clip_retrieval.models.image_size import resize_image_tower
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.image_warmup import ImageWarmup
from clip_retrieval.training.trainer import Trainer
from tests.conftest import read_json
from tests.models.small import VIT, small_clip, small_preprocess
from tests.test_resume import assert_same_ending

WARMUP = ("--start_image_size", "8", "--start_image_size_until", "0.5")
CPU = torch.device("cpu")


@pytest.fixture
def sizes(monkeypatch):
    """The sides of the images of each training and evaluation batch: (the model is training, height)."""
    found, normal = [], RetrievalModel.encode_image

    def encode_image(self, images):
        found.append((self.training, images.shape[-2]))
        return normal(self, images)

    monkeypatch.setattr(RetrievalModel, "encode_image", encode_image)
    return found


def batch(size=48):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=generator)
    return TrainBatch(images, torch.randint(1, 49000, (6, 7), generator=generator), torch.eye(6).nonzero())


def gradients_of(model, given, warmup=None, **options):
    trainer = Trainer(model.train(), LossOptions(), TrainOptions(**options), precision="fp32", device=CPU)
    trainer.image_warmup, trainer._update = warmup, lambda: None
    trainer.step(given, 1, 1e-3)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_images_are_those_that_pillow_resizes():
    given = batch()
    reduced = ImageWarmup((24, 32), 5).reduce(given, 5).images
    assert reduced.dtype == torch.uint8
    for image, found in zip(given.images, reduced):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 24), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(expected).astype(int) - found.permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("options", [{}, {"grad_cache": 4}, {"grad_checkpointing": True}], ids=str)
def test_gradients_are_those_of_a_model_for_smaller_images(options):
    def make():
        return RetrievalModel(small_clip(vision_cfg={**VIT, "image_size": 48}), small_preprocess(48))

    warmup, resized, model = ImageWarmup((32, 32), 1), make(), make()
    resize_image_tower(resized.clip.visual, 32)
    accept_smaller_images(model.clip.visual, 48, 32)
    expected = gradients_of(resized, warmup.reduce(batch(), 1))
    found = gradients_of(model, batch(), warmup, **options)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if "visual.positional_embedding" not in name:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


def test_switch_is_exact_and_evaluation_and_teacher_see_whole_images(run, arguments, sizes):
    code, out, err = run(*arguments, *WARMUP, "--augment", "crop", "--distill_from", "start")
    assert code == 0, err
    assert "images of 8 px to step 3, then of 16 px" in out
    assert [size for training, size in sizes if training] == [8, 8, 8, 16, 16, 16]
    assert {size for training, size in sizes if not training} == {16}
    assert sum(not training for training, _ in sizes) > 6  # the teacher's


def test_last_steps_are_those_of_a_run_at_full_size(run, arguments, tmp_path):
    code, _, err = run(*arguments, *WARMUP, "--keep_steps", "3", "--experiments", "warm", "--no_eval_first")
    assert code == 0, err
    # the same steps, from the state at the switch
    state = tmp_path / "logs/warm/step_3.pt"
    assert run(*arguments, "--keep_steps", "3", "--resume", state, "--start_image_size_until", "0.01")[0] == 0
    warm, plain = (torch.load(tmp_path / f"logs/{n}/last.pt", weights_only=True)["model"] for n in ("warm", "ex0"))
    assert all(torch.equal(warm[name], value) for name, value in plain.items())
    plain = run(*arguments, "--no_eval_first", "--experiments", "plain")
    assert plain[0] == 0
    other = torch.load(tmp_path / "logs/plain/last.pt", weights_only=True)["model"]
    assert not torch.equal(other["visual.conv1.weight"], warm["visual.conv1.weight"])


@pytest.mark.parametrize("killed_in_step", [2, 4, 5])
def test_resume_across_the_switch_is_bit_identical(run, run_killed, arguments, tmp_path, killed_in_step):
    command = [*arguments, *WARMUP, "--save_every", "1", "--patch_dropout", "0.5", "--ema", "0.5"]
    assert run(*command, "--experiments", "whole")[0] == 0
    run_killed(killed_in_step, *command, "--resume", "auto")
    code, _, err = run(*command, "--resume", "auto")
    assert code == 0, err
    assert_same_ending(tmp_path / "logs/whole", tmp_path / "logs/ex0")


@pytest.mark.parametrize(
    "extra",
    [
        ("--trainable", "lora", "--lora_targets", "all", "--grad_cache", "4"),
        ("--precision", "bf16", "--drop_path", "0.5", "--grad_checkpointing"),
        ("--vision_model", "resnet.json", "--image_size", "64", "--start_image_size", "32", "--grad_checkpointing"),
        ("--vision_model", "simple.json"),
        ("--unlocked_image_blocks", "0", "--loss", "siglip"),
        ("--image_size", "24", "16", "--start_image_size", "16", "8"),
    ],
    ids=" ".join,
)
def test_other_recipes_train_and_their_checkpoint_evaluates_the_same(run, arguments, captioned, tmp_path, sizes, extra):
    extra = [captioned / word if word.endswith(".json") else word for word in extra]
    code, _, err = run(*arguments, *WARMUP, *extra, "--no_eval_first")
    assert code == 0, err
    assert len({size for training, size in sizes if training}) == 2
    results, best = read_json(tmp_path / "logs/ex0/results.json"), tmp_path / "logs/ex0/best.pt"
    place = ("--checkpoint_path", tmp_path / "logs", "--experiments", "again", "--device", "cpu", "--num_workers", "0")
    code, _, err = run("--eval", "--resume", best, *place)
    assert code == 0, err
    assert read_json(tmp_path / "logs/again/results.json")["rsum"] == results["rsum"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--start_image_size", "12"), "--start_image_size 12: must be a multiple of 8 for this model; give 8"),
        (("--start_image_size", "16"), "--start_image_size 16: must be below the image size, 16; lower it"),
        (("--start_image_size", "8", "--freeze_vision"), "--start_image_size: the image tower is frozen"),
        (("--start_image_size", "8", "--trainable", "adaptor"), "--start_image_size: the image tower is frozen"),
    ],
    ids=str,
)
def test_recipe_without_use_for_it_is_refused(run, arguments, extra, words):
    code, _, err = run(*arguments, *extra)
    assert code == 2 and words in err and err.count("\n") <= 2


def test_without_the_option_nothing_is_reduced_or_replaced(run, arguments, monkeypatch):
    monkeypatch.setattr(ImageWarmup, "reduce", None)
    monkeypatch.setattr("clip_retrieval.run.train_parts.accept_smaller_images", None)
    assert run(*arguments, "--max_steps", "2")[0] == 0
