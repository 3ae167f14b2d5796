"""Time from a JPEG file to the pixels of the model, in several ways, on one core.

python benchmarks/input.py [FOLDER] [--short_side 480] [--images 100] [--size 224] [--repeats 7]

Prints two Markdown tables, for evaluation and for random crops: milliseconds of CPU time per image, the ratio to the
first row, and the largest and the mean difference in grey levels to open_clip's pixels (for random crops to those of
--augment crop with the same seeds, because open_clip draws other crops). FOLDER has JPEGs (default:
$CLIP_RETRIEVAL_DATA/coco_mini). --short_side resizes them and encodes them again in a temporary folder, if they are
smaller than COCO's (480 on the short side). Repeats are interleaved; the table has medians. The files are in the page
cache. An image cache is read in batches of 64 in random order, and is larger than the processor's caches. The first row
ends with normalised float32, all others with uint8, which is normalised on the device.

simplejpeg (pip install simplejpeg) and torchvision.io are skipped if they are not installed.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.data.pixels.cache import open_cached_pixels
from clip_retrieval.data.pixels.pixels import make_pixels
from clip_retrieval.data.pixels.transforms import evaluation_transform

Read = Callable[[list[int]], Any]
"""Read images by index into a batch, uint8 or float (images, 3, height, width)."""
BATCH = 64
ENTRIES = 1000  # images in a cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="default: $CLIP_RETRIEVAL_DATA/coco_mini")
    parser.add_argument("--short_side", type=int, metavar="PIXELS", help="default: do not resize the files")
    parser.add_argument("--images", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="image size of the model, default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args()
    folder = args.folder or Path(os.environ.get("CLIP_RETRIEVAL_DATA", "."), "coco_mini")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchvision.io warns at each call
    with tempfile.TemporaryDirectory() as temporary:
        paths = sorted(str(path) for path in folder.rglob("*.jpg"))[: args.images]
        if not paths:
            parser.error(f"{folder}: no .jpg files; give a folder, or set CLIP_RETRIEVAL_DATA")
        if args.short_side:
            paths = encode_again(paths, args.short_side, Path(temporary))
        sizes = [Image.open(path).size for path in paths]
        width, height = np.median(sizes, axis=0)
        kilobytes = sum(Path(path).stat().st_size for path in paths) / len(paths) / 1000
        print(f"{len(paths)} JPEGs, median {width:.0f} x {height:.0f}, mean {kilobytes:.0f} kB; ", end="")
        print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {Image.__version__}\n")
        caches = Path(temporary, "caches")
        print_table("evaluation", evaluation_ways(paths, args.size, caches), 0, len(paths), args.repeats)
        print_table("random crops", crop_ways(paths, args.size, caches), 1, len(paths), args.repeats)


def encode_again(paths: list[str], short_side: int, folder: Path) -> list[str]:
    encoded = []
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        scale = short_side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        encoded.append(str(folder / f"{number}.jpg"))
        image.save(encoded[-1], quality=95)
    return encoded


def evaluation_ways(paths: list[str], size: int, caches: Path) -> dict[str, Read | None]:
    """Ways to read images for evaluation; None if the library is not installed."""
    preprocess = {"size": size, "mean": (0, 0, 0), "std": (1, 1, 1)}
    reference = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    ours = evaluation_transform(preprocess)
    assert isinstance(ours, v1.Compose)
    resize_v1 = v1.Compose(ours.transforms[:-1])  # accepts tensors, through float32
    resize_uint8 = v2.Compose([v2.Resize(size, v1.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])
    images = ImageFiles(paths)

    def read_draft(index: int) -> Tensor:
        with Image.open(paths[index]) as image:
            image.draft("RGB", (size, size))
            return ours(image.convert("RGB"))

    return {
        "Pillow, open_clip's transform (torchvision v1)": one_by_one(lambda i: reference(images[i])),
        "`--decoder pillow`: Pillow, resized by Pillow": make_batches(images, preprocess, "none", "pillow"),
        "Pillow's draft mode, resized by Pillow": one_by_one(read_draft),
        "torchvision.io, resized by torchvision v1": torchvision_io(paths, resize_v1),
        "torchvision.io, resized by torch in uint8": torchvision_io(paths, resize_uint8),
        "simplejpeg, resized by Pillow": simplejpeg(paths, lambda array: ours(Image.fromarray(array))),
        "simplejpeg, resized by torch in uint8": simplejpeg(
            paths, lambda array: resize_uint8(torch.from_numpy(array).permute(2, 0, 1))
        ),
        "`--decoder fast`: Pillow, resized by torch in uint8": make_batches(images, preprocess, "none", "fast"),
        "`--image_cache`": cached_batches(paths, preprocess, caches, "none", "pillow"),
    }


def crop_ways(paths: list[str], size: int, caches: Path) -> dict[str, Read | None]:
    preprocess, images = {"size": size}, ImageFiles(paths)
    theirs = image_transform_v2(PreprocessCfg(**preprocess), is_train=True)
    return {
        "Pillow, open_clip's transform (torchvision v1)": one_by_one(lambda i: theirs(images[i])),
        "`--augment crop`": make_batches(images, preprocess, "crop", "pillow"),
        "`--augment crop --decoder fast`": make_batches(images, preprocess, "crop", "fast"),
        "`--augment crop --image_cache`": cached_batches(paths, preprocess, caches, "crop", "pillow"),
        "`--augment crop --image_cache --decoder fast`": cached_batches(paths, preprocess, caches, "crop", "fast"),
    }


def one_by_one(read: Callable[[int], Tensor]) -> Read:
    return lambda indices: torch.stack([read(i) for i in indices])


def make_batches(images: ImageFiles, preprocess: dict, augment: str, decoder: str) -> Read:
    pixels = make_pixels(images, preprocess, augment=augment, decoder=decoder)
    return lambda indices: pixels.batch(indices, indices)


def cached_batches(paths: list[str], preprocess: dict, folder: Path, augment: str, decoder: str) -> Read:
    """Batches from a cache with many copies of each image; each read takes another copy."""
    copies = -(-ENTRIES // len(paths))
    images = ImageFiles(paths * copies)
    workers = os.cpu_count() or 1
    pixels = open_cached_pixels(images, preprocess, folder, "x", augment=augment, decoder=decoder, num_workers=workers)
    draw = np.random.default_rng(0)

    def read(indices: list[int]) -> Any:
        rows = np.array(indices) + len(paths) * draw.integers(copies, size=len(indices))
        return pixels.batch(rows, indices)

    return read


def torchvision_io(paths: list[str], transform: Callable[[Tensor], Tensor]) -> Read | None:
    try:
        from torchvision.io import decode_image, read_file
    except ImportError:
        return None
    return one_by_one(lambda i: transform(decode_image(read_file(paths[i]), "RGB")))


def simplejpeg(paths: list[str], transform: Callable[[np.ndarray], Tensor]) -> Read | None:
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    return one_by_one(lambda i: transform(decode_jpeg(Path(paths[i]).read_bytes(), "RGB")))


def print_table(title: str, ways: dict[str, Read | None], reference: int, images: int, repeats: int) -> None:
    """Time all ways, and compare the pixels of number `reference` with those of the later ones."""
    # time
    installed = {name: read for name, read in ways.items() if read}
    milliseconds: dict[str, list[float]] = {name: [] for name in installed}
    draw = np.random.default_rng(0)
    for _ in range(repeats):
        for name, times in milliseconds.items():
            # A single pass over a cache is too short to measure.
            order = [int(i) for _ in range(10 if "image_cache" in name else 1) for i in draw.permutation(images)]
            started = time.process_time()
            for begin in range(0, len(order), BATCH):
                installed[name](order[begin : begin + BATCH])
            times.append((time.process_time() - started) / len(order) * 1000)

    # print, with the differences
    print(f"| {title} | ms / image | speedup | largest difference | mean difference |")
    print("|---|---|---|---|---|")
    names, rows = list(ways), list(range(images))
    expected = grey_levels(installed[names[reference]](rows))
    for number, (name, read) in enumerate(ways.items()):
        if read is None:
            print(f"| {name} | not installed | | | |")
            continue
        ratio = median(a / b for a, b in zip(milliseconds[names[0]], milliseconds[name]))
        cells = [name, f"{median(milliseconds[name]):.3f}", f"{ratio:.1f}", "", ""]
        if number >= reference:
            difference = (grey_levels(read(rows)) - expected).abs()
            cells[3:] = [f"{difference.max():.0f}", f"{difference.mean():.4f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print()


def grey_levels(pixels: Tensor) -> Tensor:
    """float32 in 0 to 255, from uint8 or from float32 in 0 to 1."""
    return pixels.float() if pixels.dtype == torch.uint8 else (pixels * 255).round()


if __name__ == "__main__":
    main()
