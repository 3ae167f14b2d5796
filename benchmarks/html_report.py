"""Time and size of report.html, of COCO's test split by default: 5,000 images, 25,000 captions, 512 dimensions.

python benchmarks/html_report.py IMAGES
python benchmarks/html_report.py IMAGES --threads 1

IMAGES is a folder of photographs, such as Flickr8K's, which are repeated if there are too few. The features are random:
that of a caption is its image's with noise, so that some queries are wrong. Prints a Markdown table.
"""

import argparse
import os
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.evaluation.evaluator import SplitFeatures
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.reporting.html.write import Evaluated, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--size", type=int, default=5000, help="number of images; five captions each")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    files = [str(path) for path in sorted(args.images.iterdir())]
    captions = [f"caption {i % 5} of image {i // 5}" for i in range(5 * args.size)]
    pairs = np.stack([np.arange(len(captions)) // 5, np.arange(len(captions))], axis=1)
    dataset = RetrievalDataset("photos", "test", ImageFiles(list(islice(cycle(files), args.size))), captions, pairs)
    runs = [make_run(dataset, name, noise) for name, noise in (("a", 5), ("b", 6))]

    print("| runs | images / captions | seconds | CPU seconds | MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.html")
        for shown in (runs[:1], runs):
            started, cpu = time.perf_counter(), time.process_time()
            write_report(path, *shown)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            size = f"{len(dataset.images):,} / {len(captions):,}"
            print(
                f"| {len(shown)} | {size} | {seconds:.1f} | {cpu:.1f} | {path.stat().st_size / 1e6:.1f} |", flush=True
            )


def make_run(dataset: RetrievalDataset, name: str, noise: float) -> Evaluated:
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(len(dataset.images), 512, generator=generator), dim=1)
    captions = torch.randn(len(dataset.captions), 512, generator=generator) * noise / 512**0.5
    captions = normalize(images[dataset.pairs[:, 0]] + captions, dim=1)
    ranks = retrieval_ranks(images, captions, dataset.pairs)
    results = report(*ranks) | {"split": "test", "model": "random features"}
    return Evaluated(name, dataset, SplitFeatures(images, captions, {}), ranks, results)


if __name__ == "__main__":
    main()
