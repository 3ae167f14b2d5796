"""A classifier with predictable answers, folders of plain colours, and a trained checkpoint."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from clip_retrieval.command_line import parse
from clip_retrieval.finetune import finetune
from tests.models.small import small_preprocess

COLOURS = ("red", "green", "blue")
TOKENIZER = open_clip.SimpleTokenizer(context_length=16)


class ColourModel(nn.Module):
    """Encodes an image as its mean colour, and a text as the counts of the three colour words."""

    trims_text = True

    def encode_image(self, images):
        return F.normalize(images.float().mean((2, 3)), dim=1)

    def encode_text(self, ids, lengths):
        words = torch.tensor([TOKENIZER.encode(name)[0] for name in COLOURS])
        return F.normalize((ids[:, :, None] == words).sum(1).float(), dim=1)


@pytest.fixture
def colour_model():
    return ColourModel()


@pytest.fixture
def preprocess():
    return small_preprocess()


def paint(path, colour, size=(20, 16)):
    """Write an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def colours(tmp_path):
    """A folder of three classes: blue (2 images, 1 of them reddish), green (2), red (4, 1 of them bluish)."""
    folder = tmp_path / "colours"
    paint(folder / "blue" / "0.png", (0, 0, 255))
    paint(folder / "blue" / "1.png", (200, 0, 100))
    paint(folder / "green" / "0.png", (0, 255, 0))
    paint(folder / "green" / "1.png", (10, 200, 20))
    for number in range(3):
        paint(folder / "red" / f"{number}.png", (255, number, number))
    paint(folder / "red" / "3.png", (100, 0, 200))
    return folder


@pytest.fixture(scope="session")
def checkpoint(captioned, tmp_path_factory):
    """A checkpoint of ours, trained for one step."""
    logs = tmp_path_factory.mktemp("classifier")
    arguments = ["--dataset", "csv", "--dataset_root", captioned, "--vision_model", captioned / "small.json"]
    arguments += ["--max_steps", "1", "--batch_size", "8", "--warmup", "0", "--lr", "1e-3", "--no_eval_first"]
    arguments += ["--num_workers", "0", "--device", "cpu", "--checkpoint_path", logs]
    finetune(parse([str(argument) for argument in arguments]))
    return logs / "ex0" / "last.pt"
