"""Write the features of a data set, or of images and texts in Chinese-CLIP's files, to disk.

python scripts/extract_features.py --resume logs/ex0/best.pt --dataset coco --dataset_root DATA
python scripts/extract_features.py --resume clip_cn_vit-b-16.pt --vision-model ViT-B-16 \
    --text-model RoBERTa-wwm-ext-base-chinese --extract-image-feats --extract-text-feats \
    --image-data DATA/lmdb/test/imgs --text-data DATA/test_texts.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.catalog import count_broken, read_dataset
from clip_retrieval.data.dataset import UNSPLIT, Images, RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.device import choose_device, disable_tf32
from clip_retrieval.distributed import Processes, process_group
from clip_retrieval.encode import encode_captions, encode_images, encoding_model
from clip_retrieval.errors import UserError, format_count, format_counts
from clip_retrieval.jsonl import Id
from clip_retrieval.log import log, start_log
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.options import DataOptions, Options
from clip_retrieval.retrieval.features import write_array, write_features
from clip_retrieval.run.folder import make_folder, results_folder
from clip_retrieval.run.model import load_model, record_model_name, warn_of_random_weights
from clip_retrieval.run.settings import settle_options
from clip_retrieval.run.splits import load_pixels


@dataclass(frozen=True)
class ExtractionRequest:
    """The features to extract, and the files to write.

    Attributes:
        extract_image_feats, extract_text_feats: extract these (default: both, or those that have a file).
        image_data: LMDB folder or tsv that replaces the data set's images.
        text_data: jsonl that replaces the data set's texts.
        output: folder of a data set's features (default: beside the checkpoint, like an evaluation's).
        image_feat_output_path, text_feat_output_path: files to write: .npy if the path ends in it, else JSON lines.
        img_batch_size, text_batch_size: items to encode at a time in each process (default: by device).
    """

    extract_image_feats: bool = False
    extract_text_feats: bool = False
    image_data: Path | None = None
    text_data: Path | None = None
    output: Path | None = None
    image_feat_output_path: Path | None = None
    text_feat_output_path: Path | None = None
    img_batch_size: int | None = None
    text_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("img_batch_size", "text_batch_size"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"--{name} {size}: must be at least 1")
        if self.uses_files and self.includes_images and self.image_data is None:
            raise UserError(
                "--extract_image_feats with --text_data: give --image_data too, a folder lmdb/.../imgs or a tsv"
            )
        if self.uses_files and self.includes_texts and self.text_data is None:
            raise UserError("--extract_text_feats with --image_data: give --text_data too, a ..._texts.jsonl")

    @property
    def uses_files(self) -> bool:
        return self.image_data is not None or self.text_data is not None

    @property
    def includes_images(self) -> bool:
        return self.extract_image_feats or (
            not self.extract_text_feats and (self.image_data is not None or not self.uses_files)
        )

    @property
    def includes_texts(self) -> bool:
        return self.extract_text_feats or (
            not self.extract_image_feats and (self.text_data is not None or not self.uses_files)
        )


def extract(typed: dict[str, Any], request: ExtractionRequest) -> None:
    """Encode images and texts with the model of the options `typed`, and write the features."""
    start_log()
    options, checkpoint = settle_options({**typed, "eval": True})
    with process_group(options.run.device) as processes:
        extract_with(options, checkpoint, request, processes)


def extract_with(
    options: Options, checkpoint: Checkpoint | None, request: ExtractionRequest, processes: Processes
) -> None:
    """Extract the features; several processes share the work."""
    # read the data and load the model
    device = choose_device(options.run.device)
    dataset = read_files(request) if request.uses_files else read_split(options.data, options.evaluation.eval_split)
    log.info(dataset.describe())
    with processes.main_first():  # may download
        model, built, tokenizer = load_model(options, checkpoint)
    options = record_model_name(options, built)
    warn_of_random_weights(built)
    # make the output folders
    folder = request.output
    if folder is None:
        split = UNSPLIT if dataset.split == UNSPLIT else options.evaluation.eval_split
        name, place = f"{options.data.name}_{split}", checkpoint.path if checkpoint else None
        folder = results_folder(options.run, "features", name, model=built.name, beside=place)
    paths = output_paths(request, folder)
    if processes.is_main:
        for parent in {path.parent for path in paths.values()}:
            make_folder(parent, "--output")
    # encode and write
    encoder = encoding_model(model.to(device), options.evaluation.eval_precision)
    shared: dict[str, Any] = {"device": device, "processes": processes}
    with disable_tf32():
        if "image" in paths:
            with processes.main_first() if options.data.image_cache else nullcontext():  # may build the cache
                pixels = load_pixels(options.data, dataset, built.preprocess, device, "none")
            features = encode_images(
                encoder.encode_image,
                pixels,
                batch_size=request.img_batch_size,
                num_workers=options.data.num_workers,
                **shared,
            )
            names = dataset.image_ids or [dataset.images.name(row) for row in range(len(dataset.images))]
            _write(paths["image"], "image", names, features, processes)
        if "text" in paths:
            features = encode_captions(
                encoder.encode_text,
                dataset.captions,
                tokenize(dataset.captions, tokenizer, options.data.caption_prefix),
                trim=encoder.trims_text,
                batch_size=request.text_batch_size,
                **shared,
            )
            _write(paths["text"], "text", dataset.text_ids or range(len(dataset.captions)), features, processes)
    if "pairs" in paths and processes.is_main:
        write_array(paths["pairs"], dataset.pairs[:, ::-1])
        log.info(f"wrote {paths['pairs']}: {format_counts(pair=len(dataset.pairs))}")


def _write(path: Path, kind: str, ids: Sequence[Id], features: Tensor, processes: Processes) -> None:
    if processes.is_main:
        write_features(path, kind, ids, features.cpu().numpy())
        log.info(f"wrote {path}: {format_count(len(features), f'{kind} feature')} of {features.shape[1]} dimensions")


def read_split(options: DataOptions, split: str) -> RetrievalDataset:
    """Read the split to extract. Raises UserError if the data set does not have it."""
    dataset = read_dataset(options, split)
    if dataset is None:
        raise UserError(
            f"{options.name} in {options.place} has no {split} split; choose another --eval_split or other data"
        )
    return dataset


def read_files(request: ExtractionRequest) -> RetrievalDataset:
    """Read the images and the distinct texts of the request's files, without pairs.

    Raises UserError, naming file and line, if a file is invalid.
    """
    from clip_retrieval.data.captions import clean_caption
    from clip_retrieval.data.images.base64_images import infer_id_types
    from clip_retrieval.data.readers.chinese import open_images, read_texts

    records = read_texts(request.text_data).records if request.text_data is not None else []
    texts = {text.text_id: clean_caption(text.text) for text in records} if request.includes_texts else {}
    images: Images = ImageFiles([])
    image_ids: list[Id] = []
    if request.includes_images and request.image_data is not None:
        images = base64_images = open_images(request.image_data)
        image_ids = infer_id_types(base64_images.keys, (image_id for text in records for image_id in text.image_ids))
    pairs = np.empty((0, 2), np.int64)
    dataset = RetrievalDataset("files", UNSPLIT, images, list(texts.values()), pairs, image_ids, list(texts))
    count_broken(dataset)
    return dataset


def output_paths(request: ExtractionRequest, folder: Path) -> dict[str, Path]:
    """The files to write for "image", "text" and "pairs": those of the request, or by default

    - DATA/test_imgs.img_feat.jsonl for DATA/lmdb/test/imgs and DATA/test_imgs.tsv,
    - DATA/test_texts.txt_feat.jsonl for DATA/test_texts.jsonl,
    - image_features.npy, text_features.npy and pairs.npy in `folder` for a data set.
    """
    paths = {}
    if request.includes_images:
        default = _image_feat_path(request.image_data) if request.image_data else folder / "image_features.npy"
        paths["image"] = request.image_feat_output_path or default
    if request.includes_texts:
        default = _text_feat_path(request.text_data) if request.text_data else folder / "text_features.npy"
        paths["text"] = request.text_feat_output_path or default
    if request.includes_images and request.includes_texts and not request.uses_files:
        paths["pairs"] = folder / "pairs.npy"
    return paths


def _text_feat_path(texts: Path) -> Path:
    return texts.with_name(f"{texts.name.removesuffix('.jsonl')}.txt_feat.jsonl")


def _image_feat_path(images: Path) -> Path:
    parts = images.absolute().parts
    if len(parts) > 3 and parts[-3] == "lmdb":  # DATA/lmdb/test/imgs
        return Path(*parts[:-3]) / f"{parts[-2]}_imgs.img_feat.jsonl"
    return images.with_name(f"{images.name.removesuffix('.tsv')}.img_feat.jsonl")
