"""Check all files of a data set before a run: read each split, and decode all of its images.

python scripts/check_data.py --annotations photos.csv
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from clip_retrieval.data.catalog import open_dataset
from clip_retrieval.data.check import find_broken_images
from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.data.images.decode import limit_image_pixels
from clip_retrieval.data.workers import default_num_workers
from clip_retrieval.errors import UserError, format_counts, one_line
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions, DatasetOptions


def check_data(options: DataOptions) -> None:
    """Check every split of every data set, and print each problem.

    Raises UserError if there is any problem.
    """
    limit_image_pixels(options.max_image_pixels)
    number = 0
    for part in replace(options, skip_broken=True).parts():  # so that missing images are listed, too
        for problem in find_problems(part):
            tqdm.write(one_line(problem))
            number += 1
    if number:
        raise UserError(
            f"{options.name} in {options.place}: {format_counts(problem=number)}; repair or delete the files, "
            "or train with --skip_broken"
        )
    log.info(f"{options.name} in {options.place}: no problems")


def find_problems(options: DatasetOptions) -> Iterator[str]:
    """Yield the problems of a data set, in the order of its splits and images."""
    workers = default_num_workers(torch.device("cpu")) if options.num_workers is None else options.num_workers
    found, errors = False, set()
    for split in ("train", "val", "test"):
        # read the split
        try:
            dataset = open_dataset(options, split)
        except UserError as error:
            if str(error) not in errors:  # the splits may be in one file
                errors.add(str(error))
                yield str(error)
            continue
        if dataset is None:
            continue
        found = True
        log.info(dataset.describe())

        # captions and images
        for image, caption in dataset.pairs.tolist():
            if not dataset.captions[caption]:
                yield f"{dataset.images.name(image)}: its caption is empty"
        rows, label = range(len(dataset.images)), f"{dataset.name} {dataset.split}"
        for _, problem in find_broken_images(dataset.images, rows, num_workers=workers, description=label):
            yield problem
        if dataset.split == UNSPLIT:  # all other splits are the same
            return
    if not found and not errors:
        yield f"{options.name} in {options.place}: there is no split"
