"""Load the splits of a data set: their images as model input, and their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.catalog import read_dataset, size_warning
from clip_retrieval.data.dataset import RetrievalDataset, StoredImages
from clip_retrieval.data.mixture import Mixture
from clip_retrieval.data.pixels.pixels import AutoAugmented, MixedPixels, Pixels, choose_num_workers, make_pixels
from clip_retrieval.errors import one_line
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions


def load_split(
    options: DataOptions,
    split: str,
    tokenizer: Any,
    preprocess: dict[str, Any],
    device: torch.device,
    augment: str = "none",
    *,
    require_pairs: bool = True,
) -> Split | None:
    """Read a split and log its size. Returns None if the data set has no such split.

    Args:
        options: the options of the data set.
        split: "train", "val" or "test".
        tokenizer, preprocess: those of the model.
        device: the device of the model, which determines the number of loader workers.
        augment: "none", "crop" or "auto".
        require_pairs: raise UserError if no image has a caption; if False, return None instead.
    """
    dataset = read_dataset(options, split)
    if dataset is None:
        return None
    if not require_pairs and len(dataset.pairs) == 0:
        log.warning(f"{dataset.name}, {split} split: no image has a caption; it cannot be scored")
        return None
    dataset.require_pairs()
    tokens = tokenize(dataset.captions, tokenizer)
    cut = f"; {tokens.cut:,} cut to {tokens.ids.shape[1]} tokens" if tokens.cut else ""
    log.info(f"{dataset.name} {split}: {len(dataset.images):,} images, {len(dataset.captions):,} captions{cut}")
    for part in dataset.parts:
        if warning := size_warning(part):
            log.warning(warning)
    return Split(dataset, tokens, load_pixels(options, dataset, preprocess, device, augment))


def load_pixels(
    options: DataOptions, dataset: RetrievalDataset, preprocess: dict[str, Any], device: torch.device, augment: str
) -> Pixels:
    """Return the images as model input, from --image_cache if it is given."""
    if augment == "auto":
        return AutoAugmented(load_pixels(options, dataset, preprocess, device, "crop"))
    if isinstance(dataset, Mixture):
        return MixedPixels([load_pixels(options, part, preprocess, device, augment) for part in dataset.parts])
    settings: dict[str, Any] = {"augment": augment, "decoder": options.decoder}
    pixels = make_pixels(dataset.images, preprocess, **settings)
    if not options.image_cache or not isinstance(dataset.images, StoredImages):
        return pixels
    from clip_retrieval.data.pixels.cache import open_cached_pixels  # its file locks do not exist on Windows

    return open_cached_pixels(
        dataset.images,
        preprocess,
        Path(options.image_cache),
        f"{dataset.name}_{dataset.split}",
        num_workers=choose_num_workers(options.num_workers, pixels, device),
        **settings,
    )


def log_samples(dataset: RetrievalDataset, number: int = 3) -> None:
    """Log a few captions, spread over the split."""
    for row in torch.linspace(0, len(dataset.pairs) - 1, number).long().unique().tolist():
        image, caption = dataset.pairs[row]
        log.info("  " + one_line(f"{Path(dataset.images.name(image)).name}: {dataset.captions[caption]}"))
