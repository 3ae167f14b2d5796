"""Load the splits of a data set: their images as model input, and their tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.catalog import read_dataset, size_warning
from clip_retrieval.data.check import find_broken_images
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset, StoredImages
from clip_retrieval.data.mixture import Mixture
from clip_retrieval.data.pixels.jpeg import check_decoder
from clip_retrieval.data.pixels.pixels import MixedPixels, Pixels, choose_num_workers, make_pixels
from clip_retrieval.data.selection import without_images
from clip_retrieval.data.workers import default_num_workers
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError, one_line
from clip_retrieval.log import log
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.options import DataOptions, Options, select_for_resume


def read_split(
    options: DataOptions,
    split: str,
    device: torch.device,
    processes: Processes,
    *,
    require_pairs: bool = True,
    decode_all: bool = True,
) -> RetrievalDataset | None:
    """Read a split. Returns None if the data set has no such split.

    Args:
        options: the options of the data set.
        split: "train", "val" or "test".
        device: the device of the model, which determines the number of loader workers.
        processes: they share the decoding of all images.
        require_pairs: raise UserError if no image has a caption; if False, return None instead.
        decode_all: with --skip_broken, leave out the images that cannot be decoded; training replaces them instead.
    """
    check_decoder(options.decoder, device)
    dataset = read_dataset(options, split)
    if dataset is not None and options.skip_broken and decode_all:
        dataset = _without_broken_images(dataset, options.num_workers, device, processes)
    if dataset is None or len(dataset.pairs) or require_pairs:
        if dataset is not None:
            dataset.require_pairs()
        return dataset
    log.warning(f"{dataset.name}, {split} split: no image has a caption; it cannot be scored")
    return None


def _without_broken_images(
    dataset: RetrievalDataset, num_workers: int | None, device: torch.device, processes: Processes
) -> RetrievalDataset:
    """Decode all images, and leave out those that cannot be decoded."""
    workers = default_num_workers(device) if num_workers is None else num_workers
    own = range(len(dataset.images))[processes.rank :: processes.world_size]
    label = f"{dataset.name} {dataset.split}, check"
    found = dict(find_broken_images(dataset.images, own, num_workers=workers, description=label))
    broken = torch.zeros(len(dataset.images), dtype=torch.int64)
    broken[list(found)] = 1
    rows = processes.sum(broken).nonzero()[:, 0].tolist()
    first = f": {next(iter(found.values()))}" if found else ""
    return without_images(dataset, rows, f"broken{first}")


def count_trained(
    dataset: RetrievalDataset, fractions: dict[str, float], checkpoint: Checkpoint | None, pretrained: str | None
) -> int:
    """Count the images of a split that the checkpoint, or --pretrained, was trained on; warn if there are any.

    This concerns data without splits, and `fractions` of it that are held out: other splits keep them apart.
    """
    # find the checkpoint and its train split
    if dataset.split != UNSPLIT and not any(fractions.values()):
        return 0
    if checkpoint is None and pretrained and Path(pretrained).is_file():
        checkpoint = Checkpoint.load_if_ours(Path(pretrained))
    if checkpoint is None:
        return 0
    try:
        trained = read_dataset(Options.from_flat(select_for_resume(checkpoint.options)).data, "train")
    except UserError as error:
        log.warning(f"it is unknown whether {checkpoint.path} was trained on these images: {error}")
        return 0

    # count the common images
    known = set(_absolute_names(trained)) if trained else set()
    common = sum(name in known for name in _absolute_names(dataset))
    if common:
        log.warning(
            f"{checkpoint.path} WAS TRAINED ON {common:,} OF THESE {len(dataset.images):,} IMAGES: the results do not "
            "tell how good it is on others; hold images out of training with --val_fraction and --test_fraction"
        )
    return common


def _absolute_names(dataset: RetrievalDataset) -> Iterator[str]:
    return (os.path.abspath(dataset.images.name(index)) for index in range(len(dataset.images)))  # noqa: PTH100


def make_split(
    options: DataOptions,
    dataset: RetrievalDataset,
    tokenizer: Any,
    preprocess: dict[str, Any],
    device: torch.device,
    augment: str = "none",
) -> Split:
    """Prepare a split for a model, and log its size.

    Args:
        options: the options of the data set.
        dataset: the split.
        tokenizer, preprocess: those of the model.
        device: the device of the model, which determines the number of loader workers.
        augment: as in `ImageTransform`.
    """
    tokens = tokenize(dataset.texts, tokenizer, options.caption_prefix)
    cut = f"; {tokens.cut:,} cut to {tokens.ids.shape[1]} tokens" if tokens.cut else ""
    log.info(f"{dataset.describe()}{cut}")
    for part in dataset.parts:
        if warning := size_warning(part):
            log.warning(warning)
    return Split(dataset, tokens, load_pixels(options, dataset, preprocess, device, augment))


def describe_prefix(options: DataOptions) -> dict[str, str]:
    """The entry of --caption_prefix in results.json; empty without one."""
    return {"caption_prefix": options.caption_prefix} if options.caption_prefix else {}


def load_pixels(
    options: DataOptions, dataset: RetrievalDataset, preprocess: dict[str, Any], device: torch.device, augment: str
) -> Pixels:
    """Return the images as model input, from --image_cache if it is given."""
    if isinstance(dataset, Mixture):
        return MixedPixels([load_pixels(options, part, preprocess, device, augment) for part in dataset.parts])
    settings: dict[str, Any] = {"augment": augment, "crop_scale": options.crop_scale, "decoder": options.decoder}
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
