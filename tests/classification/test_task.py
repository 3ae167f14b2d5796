"""Encoding and scoring: against a plain loop, by hand, and independent of batches and workers."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_retrieval.classification.embeddings import class_embeddings, prompt_classes
from clip_retrieval.classification.folder import LabelledImages
from clip_retrieval.classification.labelled_sets import ZeroShotData
from clip_retrieval.classification.task import make_task, prepare_task, score_task
from clip_retrieval.classification.templates import SETS, Templates
from clip_retrieval.data.images.image_files import ImageArray, ImageFiles
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import EvalOptions
from tests.classification.conftest import TOKENIZER
from tests.models.small import small_clip, small_preprocess

CPU = torch.device("cpu")
HERE = {"device": CPU, "num_workers": 0}
PLAIN = Templates("own", ("a photo of a {}.",))


@pytest.fixture(scope="module")
def model():
    return RetrievalModel(small_clip(), small_preprocess()).eval()


def noise(number):
    return ImageArray(np.random.default_rng(0).integers(0, 256, (number, 16, 16, 3), dtype=np.uint8), "noise")


def test_class_embeddings_equal_a_plain_loop(model):
    names = ["cat", "great white shark", "cat", "crane"]
    templates = Templates("cifar", SETS["cifar"])
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    rows = []
    with torch.no_grad():
        for name in names:
            texts = tokenizer([template.format(name) for template in templates.texts])
            features = F.normalize(model.clip.encode_text(texts).double(), dim=-1)
            rows.append(F.normalize(features.mean(0), dim=-1))
    ready = prompt_classes("test", noise(2), names, templates, tokenizer, small_preprocess())
    found = ready.encode(model, EvalOptions(eval_batch_size=5), **HERE).classes
    assert found.dtype == torch.float32 and torch.equal(found[0], found[2])
    torch.testing.assert_close(found.double(), torch.stack(rows), rtol=0, atol=1e-6)


def test_scores_equal_clips_reference_recipe(model, captioned):
    names = ["dog", "teddy bear", "school bus"]
    labelled = LabelledImages(
        "photos", ImageFiles([str(captioned / f"{i}.jpg") for i in range(7)]), np.zeros(7, int), names
    )
    templates = Templates("imagenet", SETS["imagenet"])
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**small_preprocess()), is_train=False
    )
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(model.clip, tokenizer, names, templates.texts)
        images = torch.stack([transform(labelled.images[row]) for row in range(7)])
        reference = F.normalize(model.clip.encode_image(images), dim=-1) @ classifier
    features = make_task(labelled, templates, tokenizer, small_preprocess()).inputs.encode(model, EvalOptions(), **HERE)
    torch.testing.assert_close(features.images @ features.classes.T, reference, rtol=0, atol=1e-5)


def test_class_embedding_is_the_mean_over_templates():
    prompts = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0, 1]])
    torch.testing.assert_close(class_embeddings(prompts, 2), expected)


def test_accuracy_on_a_folder_by_hand(colour_model, colours, preprocess):
    """blue/1 is nearest to red and red/3 to blue, with their own class second; the others are correct."""
    task = prepare_task(ZeroShotData(str(colours), template=("a {} thing", "{}")), TOKENIZER, preprocess)
    block = score_task(colour_model, task, EvalOptions(), **HERE)
    assert block["top1"] == pytest.approx(75)
    assert block["mean_per_class"] == pytest.approx((50 + 100 + 75) / 3)
    assert {name: block[name] for name in ("dataset", "images", "classes", "precision", "template_set")} == {
        "dataset": "colours",
        "images": 8,
        "classes": 3,
        "precision": "fp32",
        "template_set": "own",
    }
    assert block["templates"] == ["a {} thing", "{}"]
    blue, green, red = block["per_class"]
    assert (blue["top1"], blue["confused_with"], blue["confused"]) == (50, "red", 50)
    assert (green["top1"], green["confused_with"]) == (100, None)
    assert (red["images"], red["top1"], red["confused_with"], red["confused"]) == (4, 75, "blue", 25)
    assert set(block["seconds"]) == {"images", "classes", "ranks", "total"}


def test_classes_with_the_same_name_tie(colour_model, preprocess):
    """Two classes called red: each is right half of the time, in any order."""
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    pixels[:, :, :, 0] = 255
    pixels[3] = (0, 255, 0)
    labelled = LabelledImages("twins", ImageArray(pixels, "twins"), np.array([0, 1, 2, 1]), ["red", "green", "red"])
    block = score_task(colour_model, make_task(labelled, PLAIN, TOKENIZER, preprocess), EvalOptions(), **HERE)
    assert block["classes"] == 3 and [each["label"] for each in block["per_class"]] == [0, 1, 2]
    assert [each["top1"] for each in block["per_class"]] == [50, 50, 50]
    assert block["top1"] == 50


class Collapsed(nn.Module):
    """Encodes everything as the same feature."""

    trims_text = True

    def encode_image(self, images):
        return F.normalize(torch.ones(len(images), 7), dim=1)

    def encode_text(self, ids, lengths):
        return F.normalize(torch.ones(len(ids), 7), dim=1)


def test_collapsed_model_scores_chance(preprocess):
    names = [f"class {number}" for number in range(20)]
    labelled = LabelledImages("same", noise(30), np.arange(30) % 20, names)
    block = score_task(Collapsed(), make_task(labelled, PLAIN, TOKENIZER, preprocess), EvalOptions(), **HERE)
    assert [block[name] for name in ("top1", "top5", "top10", "mean_per_class")] == pytest.approx([5, 25, 50, 5])


@pytest.fixture(scope="module")
def task():
    names = ["cat", "dog", "great white shark", "crane", "cat", "bus"]
    labelled = LabelledImages("noise", noise(25), np.arange(25) % 6, names)
    return make_task(labelled, Templates("simple", SETS["simple"]), TOKENIZER, small_preprocess())


def numbers(block):
    return {name: value for name, value in block.items() if name != "seconds"}


def test_batches_workers_and_repetition_change_nothing(model, task):
    expected = numbers(score_task(model, task, EvalOptions(), **HERE))
    for batch_size, workers in ((1, 0), (7, 2), (None, 0)):
        options = EvalOptions(eval_batch_size=batch_size)
        assert numbers(score_task(model, task, options, num_workers=workers, device=CPU)) == expected


@pytest.mark.parametrize("training", [True, False])
def test_model_keeps_its_training_mode(model, task, training):
    model.train(training)
    score_task(model, task, EvalOptions(), **HERE)
    assert model.training == training and model.clip.visual.training == training
    model.eval()


def test_lower_precision_is_recorded_and_keeps_the_model(model, task):
    block = score_task(model, task, EvalOptions(eval_precision="bf16"), **HERE)
    assert block["precision"] == "bf16"
    assert model.clip.logit_scale.dtype == torch.float32
