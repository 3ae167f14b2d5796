"""Time of a whole evaluation, compared with clip-benchmark and with "every image five times, 77 tokens".

python benchmarks/evaluation.py                                   # Flickr8K's test split in $CLIP_RETRIEVAL_DATA
python benchmarks/evaluation.py --images 100 --rows ours clip_benchmark
python benchmarks/evaluation.py --dataset coco --dataset_root DATA [--pretrained FILE]
python benchmarks/evaluation.py --dataset random                  # the default on CUDA

Prints a Markdown table, each row when it is measured. --repeats are interleaved; the last round prints the medians.
"ratio" is the time per image with its captions over that of the first row; "images s", "captions s" and "ranks s" are
parts of the time. --five_images reduces the images of the slowest row, five_times. Weights are random with a fixed seed
unless --pretrained is given: they change the recalls (percent), not the time.

"ours" is tokenising, `encode_split` and `score`. "clip_benchmark" (pip install --no-deps clip-benchmark) is its
zeroshot_retrieval.evaluate without autocast, on the same images with open_clip's transform. "five_times" iterates over
all (image, caption) pairs, preprocesses and encodes the image and the full-length caption of each, and sorts the whole
score matrix in both directions, as CLIP_ITM does. "fast" and "gpu" are ours with that --decoder. All rows have the same
batch size, number of workers and an empty tokenizer cache; the files are in the page cache.

`--dataset random` has the size of COCO's test split: 5,000 decoded noise images of the model's size in memory, so
decoding and resizing take almost no time, and real captions (--captions, a Karpathy JSON; default: COCO's in
$CLIP_RETRIEVAL_DATA). Images in memory are read without workers unless --num_workers is given.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

# torch reads it when it loads. The package sets it too, but is imported after torch here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from karpathy import read_part
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset, default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.data.dataset import Images, RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray, ImageFiles
from clip_retrieval.data.pixels.pixels import choose_num_workers, make_pixels
from clip_retrieval.device import choose_device, device_name
from clip_retrieval.encode import IMAGE_BATCH_SIZE
from clip_retrieval.evaluation.evaluator import encode_split, score
from clip_retrieval.models.build import BuiltModel, build_model
from clip_retrieval.models.tokenizers import build_tokenizer
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import DataOptions, EvalOptions, ModelOptions

DATA = Path(os.environ.get("CLIP_RETRIEVAL_DATA", "."))
CAPTIONS = DATA / "coco_text" / "dataset_coco_karpathy_test.json.gz"


@dataclass
class Measurement:
    """Seconds of a row in total and, if known, by part; recalls in percent."""

    total: float
    i2t: float
    t2i: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Setting:
    """Settings shared by all rows."""

    built: BuiltModel
    device: torch.device
    num_workers: int
    batch_size: int

    def new_tokenizer(self) -> Callable[[list[str]], Tensor]:
        """A tokenizer with an empty cache."""
        return build_tokenizer(ModelOptions(), self.built)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vision_model", default="ViT-B/32", help="default: %(default)s")
    parser.add_argument("--pretrained", default="none", help="weights, default: random ones")
    parser.add_argument("--dataset", help="`random`, or as main.py takes it; default: flickr8k, on CUDA random")
    parser.add_argument("--dataset_root", help="default: the data set's folder in $CLIP_RETRIEVAL_DATA")
    parser.add_argument("--captions", type=Path, default=CAPTIONS, help="of --dataset random")
    parser.add_argument("--images", type=int, help="number of images, default: all")
    parser.add_argument("--five_images", type=int, help="number of images of five_times, default: as --images")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, help=f"default: {' '.join(DEFAULT_ROWS)}; bf16 on CUDA and AMX"
    )
    parser.add_argument("--batch_size", type=int, help="default: that of an evaluation")
    parser.add_argument("--num_workers", type=int, help="default: that of an evaluation")
    parser.add_argument("--repeats", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--device", help="default: the best available")
    args = parser.parse_args()
    # model and data
    device = choose_device(args.device)
    torch.manual_seed(0)
    built = build_model(ModelOptions(vision_model=args.vision_model, pretrained=args.pretrained))
    dataset = first_images(load_dataset(args, built, device), args.images)
    pixels = make_pixels(dataset.images, built.preprocess)
    num_workers = choose_num_workers(args.num_workers, pixels, device)
    setting = Setting(built, device, num_workers, args.batch_size or IMAGE_BATCH_SIZE[device.type])
    built.clip.to(device)
    names = args.rows or list(DEFAULT_ROWS)

    # the setting, and the head of the table
    print(
        f"{args.vision_model}, weights: {built.weights}; {dataset.name} {dataset.split}; {device_name(device)}, "
        f"batches of {setting.batch_size}, {num_workers} workers, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    if not args.rows and device.type == "cpu" and not getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        names.remove("bf16")
        print("bf16 is not measured: this CPU has no AMX")
    if built.weights == "none":
        print("The weights are random: the recalls are chance")
    print("\n| | images / captions | seconds | ratio | images s | captions s | ranks s | i2t R@1 | t2i R@1 |")
    print("|---|---|---|---|---|---|---|---|---|")

    # measure the rows in turn
    read_files(dataset)
    datasets = dict.fromkeys(names, dataset) | {"five_times": first_images(dataset, args.five_images)}
    if device.type == "cuda":  # the first use of a GPU loads kernels
        for name in names:
            ROWS[name](first_images(dataset, setting.batch_size), setting)
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for repeat in range(args.repeats):
        for name in names:
            found[name].append(ROWS[name](datasets[name], setting))
            if repeat == args.repeats - 1:
                first = median(m.total for m in found[names[0]]) / len(datasets[names[0]].images)
                print_row(name, datasets[name], found[name], first)


def load_dataset(args: argparse.Namespace, built: BuiltModel, device: torch.device) -> RetrievalDataset:
    name = args.dataset or ("random" if device.type == "cuda" and not args.dataset_root else "flickr8k")
    if name == "random":
        return random_images(args.captions, built.preprocess["size"])
    root = args.dataset_root or str(DATA / name)
    dataset = read_dataset(DataOptions(dataset=(name,), dataset_root=(root,)), "test")
    if dataset is None:
        raise SystemExit(f"{name} has no test split; choose other data")
    return dataset


def random_images(captions: Path, size: int | tuple[int, int]) -> RetrievalDataset:
    part = read_part(captions, "test")
    height, width = (size, size) if isinstance(size, int) else size
    noise = np.random.default_rng(0).integers(256, size=(len(part.names), height, width, 3), dtype=np.uint8)
    return RetrievalDataset("random", "test", ImageArray(noise, "random"), part.texts, part.pairs)


def first_images(dataset: RetrievalDataset, number: int | None) -> RetrievalDataset:
    """The first images of a data set with their captions."""
    if number is None or number >= len(dataset.images):
        return dataset
    images: Images
    if isinstance(dataset.images, ImageArray):
        images = ImageArray(dataset.images.pixels[:number], dataset.name)
    else:
        assert isinstance(dataset.images, ImageFiles)
        images = ImageFiles(dataset.images.paths[:number])
    pairs = dataset.pairs[dataset.pairs[:, 0] < number]
    kept, caption = np.unique(pairs[:, 1], return_inverse=True)
    captions = [dataset.captions[i] for i in kept]
    return RetrievalDataset(dataset.name, dataset.split, images, captions, np.stack([pairs[:, 0], caption], axis=1))


def read_files(dataset: RetrievalDataset) -> None:
    """Read the image files into the page cache, so the first row does not wait for the disk."""
    if isinstance(dataset.images, ImageFiles):
        for path in dataset.images.paths:
            Path(path).read_bytes()


def print_row(name: str, dataset: RetrievalDataset, measurements: list[Measurement], first: float) -> None:
    """Print one row; `first` is the first row's seconds per image with its captions."""
    total = median(m.total for m in measurements)
    sizes = f"{len(dataset.images):,} / {len(dataset.captions):,}"
    ratio = total / len(dataset.images) / first
    parts = [
        f"{median(m.parts[part] for m in measurements):.2f}" if part in measurements[0].parts else ""
        for part in ("images", "captions", "ranks")
    ]
    recalls = [f"{measurements[0].i2t:.2f}", f"{measurements[0].t2i:.2f}"]
    print(f"| {' | '.join([name, sizes, f'{total:.2f}', f'{ratio:.2f}', *parts, *recalls])} |", flush=True)


def ours(dataset: RetrievalDataset, setting: Setting, precision: str = "fp32", decoder: str = "pillow") -> Measurement:
    tokenizer = setting.new_tokenizer()
    model = RetrievalModel(setting.built.clip, setting.built.preprocess).to(setting.device)
    options = EvalOptions(eval_batch_size=setting.batch_size, eval_precision=precision)
    started = time.perf_counter()
    tokens = tokenize(dataset.captions, tokenizer)
    pixels = make_pixels(dataset.images, setting.built.preprocess, decoder=decoder)
    tokenized_at = time.perf_counter()
    workers, device = setting.num_workers, setting.device
    features = encode_split(model, dataset, tokens, pixels, options, num_workers=workers, device=device)
    block, _ = score(features, dataset, options)
    total = time.perf_counter() - started
    parts = {**block["seconds"]}
    parts["captions"] += tokenized_at - started
    return Measurement(total, block["i2t"]["R@1"], block["t2i"]["R@1"], parts)


def clip_benchmark(dataset: RetrievalDataset, setting: Setting) -> Measurement:
    from clip_benchmark.metrics import zeroshot_retrieval

    tokenizer, device, model = setting.new_tokenizer(), setting.device.type, setting.built.clip.eval()
    started = time.perf_counter()
    batches = data_loader(CaptionsOfImages(dataset, setting.built.preprocess), setting)
    found = zeroshot_retrieval.evaluate(model, batches, tokenizer, device, amp=False, recall_k_list=[1, 5, 10])
    total = time.perf_counter() - started
    return Measurement(total, 100 * found["text_retrieval_recall@1"], 100 * found["image_retrieval_recall@1"])


@torch.no_grad()
def five_times(dataset: RetrievalDataset, setting: Setting) -> Measurement:
    tokenizer, device, model = setting.new_tokenizer(), setting.device, setting.built.clip.eval()
    parts = {"images": 0.0, "captions": 0.0, "ranks": 0.0}

    @contextmanager
    def timed_part(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        parts[part] += time.perf_counter() - started

    # encode the image and the caption of every pair
    started = time.perf_counter()
    batches = iter(data_loader(Pairs(dataset, setting.built.preprocess), setting))
    image_features, text_features = [], []
    for _ in range(len(batches)):
        with timed_part("images"):
            images, captions = next(batches)
            image_features.append(normalize(model.encode_image(images.to(device)), dim=-1))
        with timed_part("captions"):
            text_features.append(normalize(model.encode_text(tokenizer(captions).to(device)), dim=-1))

    # sort the whole matrix in both directions
    with timed_part("ranks"):
        scores = torch.cat(image_features) @ torch.cat(text_features).T
        owner = torch.from_numpy(dataset.pairs[:, 0]).to(device)
        # Row and column i belong to pair i. An image has several identical rows.
        nearest = [matrix.argsort(dim=1, descending=True)[:, 0] for matrix in (scores, scores.T)]
        first = torch.from_numpy(dataset.first_pair[:-1]).to(device)
        right_text, right_image = (100 * (owner[column] == owner).float() for column in nearest)
        i2t, t2i = right_text[first].mean().item(), right_image.mean().item()
    return Measurement(time.perf_counter() - started, i2t, t2i, parts)


DEFAULT_ROWS: dict[str, Callable[[RetrievalDataset, Setting], Measurement]] = {
    "ours": ours,
    "clip_benchmark": clip_benchmark,
    "five_times": five_times,
    "bf16": partial(ours, precision="bf16"),
}
ROWS = DEFAULT_ROWS | {decoder: partial(ours, decoder=decoder) for decoder in ("fast", "gpu")}


class Items(Dataset):
    """A data set with open_clip's transform."""

    def __init__(self, dataset: RetrievalDataset, preprocess: dict[str, Any]):
        self.dataset = dataset
        self.transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


class CaptionsOfImages(Items):
    """(float image, its captions) of each image, the input of clip-benchmark."""

    def __len__(self) -> int:
        return len(self.dataset.images)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        captions = self.dataset.pairs[slice(*self.dataset.first_pair[index : index + 2]), 1]
        return self.transform(self.dataset.images[index]), [self.dataset.captions[i] for i in captions]


class Pairs(Items):
    """(float image, caption) of each pair."""

    def __len__(self) -> int:
        return len(self.dataset.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image, caption = self.dataset.pairs[index]
        return self.transform(self.dataset.images[image]), self.dataset.captions[caption]


def data_loader(items: Dataset, setting: Setting) -> DataLoader:
    def collate(batch: list[tuple[Tensor, Any]]) -> tuple[Tensor, list]:
        return default_collate([image for image, _ in batch]), [text for _, text in batch]

    return DataLoader(
        items,
        setting.batch_size,
        num_workers=setting.num_workers,
        collate_fn=collate,
        pin_memory=setting.device.type == "cuda",
    )


if __name__ == "__main__":
    main()
