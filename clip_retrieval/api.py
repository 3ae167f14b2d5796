"""The Python interface to models and data sets, see docs/python.md.

Modules that load torch, or change settings of Pillow, are imported when a function is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_retrieval.options import DataOptions, ModelOptions

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from clip_retrieval.data.captions import Tokenizer
    from clip_retrieval.data.dataset import Images, RetrievalDataset
    from clip_retrieval.models.towers import RetrievalModel


@dataclasses.dataclass
class ImageTextModel:
    """A model with its tokenizer and its preprocessing. Made by `load_model`.

    Attributes:
        name: name of the model.
        model: the towers, in evaluation mode; `model.clip` is open_clip's module.
        tokenizer: maps a list of texts to ids, int64 (texts, context_length).
        preprocess: maps an image of Pillow to open_clip's input, float32 (3, height, width), normalised.
        device: the device of the model.
        config: open_clip's model config.
        caption_prefix: text that `encode_texts` puts before every text; that of the checkpoint, see --caption_prefix.
    """

    name: str
    model: RetrievalModel
    tokenizer: Tokenizer
    preprocess: Callable[[Image.Image], torch.Tensor]
    device: torch.device
    config: dict[str, Any]
    caption_prefix: str | None = None

    def encode_images(
        self,
        images: Sequence[str | Path | Image.Image] | Images,
        batch_size: int | None = None,
        num_workers: int = 0,
    ) -> torch.Tensor:
        """Encode images as float32 (images, dim) on the model's device, L2-normalised.

        Args:
            images: paths, images of Pillow, or the `images` of a data set.
            batch_size: images at a time (default: by device).
            num_workers: processes that decode images; with more than 0, a script needs `if __name__ == "__main__":`.

        Raises UserError, naming the image, if it cannot be read.
        """
        from clip_retrieval.data.pixels.pixels import make_pixels
        from clip_retrieval.device import disable_tf32
        from clip_retrieval.encode import encode_images

        pixels = make_pixels(_Opened(images), self.model.preprocess)
        shared: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "device": self.device}
        with disable_tf32():
            return encode_images(self.model.encode_image, pixels, **shared)

    def encode_texts(self, texts: Sequence[str], batch_size: int | None = None) -> torch.Tensor:
        """Encode texts as float32 (texts, dim) on the model's device, L2-normalised.

        `caption_prefix` is put before each. Texts longer than the context are cut, keeping the end token. Equal texts
        are encoded once.
        """
        from clip_retrieval.data.captions import clean_caption, tokenize
        from clip_retrieval.device import disable_tf32
        from clip_retrieval.encode import encode_captions

        if isinstance(texts, str):
            raise TypeError("texts is a str; give a list of texts")
        captions = [clean_caption(text) for text in texts]
        tokens, trim = tokenize(captions, self.tokenizer, self.caption_prefix), self.model.trims_text
        with disable_tf32():
            return encode_captions(
                self.model.encode_text, captions, tokens, trim=trim, batch_size=batch_size, device=self.device
            )


class _Opened:
    """Images by index, from paths and images of Pillow."""

    def __init__(self, images: Sequence[str | Path | Image.Image] | Images):
        if isinstance(images, (str, Path)):
            raise TypeError(f"images is a {type(images).__name__}; give a list of paths or images")
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        from clip_retrieval.data.images.decode import as_rgb, decode_rgb

        image = self._images[index]
        return decode_rgb(str(image), str(image)) if isinstance(image, (str, Path)) else as_rgb(image)

    def name(self, index: int) -> str:
        return str(self._images[index])


def load_model(path_or_name: str | Path, device: torch.device | str | None = None, **options: Any) -> ImageTextModel:
    """Load a model for inference.

    Args:
        path_or_name: a checkpoint (`logs/ex0/best.pt`), a weight file that --pretrained accepts, or a name that
            --vision_model accepts (`ViT-B/32`, `hf-hub:ORG/NAME`, `local-dir:PATH`, a model config .json).
        device: default: the best one available.
        options: further options of the command line about the model: pretrained, text_model, tokenizer, ...

    Raises UserError if the model is unknown, or cannot be fetched, read or built.
    """
    import torch
    from torchvision.transforms.v2 import Compose, Normalize, ToDtype

    from clip_retrieval.data.images.decode import as_rgb
    from clip_retrieval.data.pixels.transforms import evaluation_transform
    from clip_retrieval.device import choose_device
    from clip_retrieval.models.weights import WEIGHT_FILES
    from clip_retrieval.run import model as run_model
    from clip_retrieval.run.settings import settle_options

    _refuse_unknown(options, ModelOptions, "load_model")
    path = Path(path_or_name)
    is_file = path.suffix in WEIGHT_FILES or (path.is_file() and path.suffix != ".json")
    source = {"resume" if is_file else "vision_model": str(path_or_name)}
    settled, checkpoint = settle_options({**source, **options, "eval": True})
    chosen = choose_device(None if device is None else str(device))
    with torch.random.fork_rng(devices=[]):  # random initial weights are replaced
        model, built, tokenizer = run_model.load_model(settled, checkpoint)
    run_model.warn_of_random_weights(built)
    normalize = Normalize(built.preprocess["mean"], built.preprocess["std"])
    transform = Compose([as_rgb, evaluation_transform(built.preprocess), ToDtype(torch.float32, scale=True), normalize])
    prefix = settled.data.caption_prefix
    return ImageTextModel(built.name, model.to(chosen).eval(), tokenizer, transform, chosen, built.config, prefix)


def read_dataset(
    name: str | Sequence[str], root: str | Path | None = None, split: str = "test", **options: Any
) -> RetrievalDataset:
    """Read a split of a data set. Images are located, and opened on access.

    Args:
        name: a name that --dataset accepts, such as "coco" or "csv".
        root: folder of the data set; see docs/data.md for the layouts.
        split: "train", "val" or "test"; for data without splits, any of them is the whole.
        options: further options of the command line about the data: annotations, image_dir, image_column, ...

    Returns:
        `images` (by index, as RGB), `captions`, and `pairs`, int64 (pairs, 2) of image index and caption index.

    Raises UserError if there is no such data set or split, or its files are missing or invalid.
    """
    from clip_retrieval.data import catalog
    from clip_retrieval.errors import UserError
    from clip_retrieval.run.merge import settle

    _refuse_unknown(options, DataOptions, "read_dataset")
    place = {} if root is None else {"dataset_root": str(root)}
    paths = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    settled = settle({"dataset": name, **place, **paths}).data
    dataset = catalog.read_dataset(settled, split)
    if dataset is None:
        raise UserError(f"{settled.name} in {settled.place} has no {split} split; choose another one")
    return dataset


def _refuse_unknown(options: Iterable[str], group: type, function: str) -> None:
    known = {field.name for field in dataclasses.fields(group)}
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; options are {sorted(known)}")
