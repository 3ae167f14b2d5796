"""Time and memory of the exact ranks, compared with the bare matrix product and with clip-benchmark's evaluator.

python benchmarks/ranks.py [--sizes 1000/5000 5000/25000 25000/125000] [--repeats 5]

Prints a Markdown table. Features are random clusters with R@1 between 30 and 60 % at 5,000 images. "bare" is the
float32 matrix product alone, in the same tiles, with its scores discarded: a cost of any evaluation. clip-benchmark
(pip install clip-benchmark) is timed from its full score matrix to R@1, R@5 and R@10, as in its `evaluate` after
encoding. Repeats are interleaved; the table has medians. Peak memory is measured beyond the features, in a separate
process (Linux).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TypeVar

# torch reads it when it loads. Threads that spin while they wait (the default) starve each other on a busy machine:
# each small step between two products then takes milliseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.scores import tile_size

T = TypeVar("T")
DEFAULT_SIZES = ["1000/5000", "5000/25000", "25000/125000"]
PEER_HELP = (
    "largest size at which clip-benchmark runs (default: %(default)s); it needs 5 bytes per (image, caption) pair, "
    "and many minutes for larger sizes"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=DEFAULT_SIZES, metavar="IMAGES/CAPTIONS")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--peer_up_to", type=int, default=25000, metavar="CAPTIONS", help=PEER_HELP)
    args = parser.parse_args()
    print(f"d = {args.dim}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| images / captions | ours (s) | bare (s) | ratio | peak (MiB) | clip-benchmark (s) | its peak (MiB) |")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        images, captions = (int(number) for number in size.split("/"))
        ours, bare, ratio, peak = in_a_process(measure_ours, images, captions, args.dim, args.repeats)
        row = [f"{images:,} / {captions:,}", f"{ours:.3f}", f"{bare:.3f}", f"{ratio:.2f}", f"{peak:.0f}"]
        if captions <= args.peer_up_to:
            row += in_a_process(measure_peer, images, captions, args.dim)
        else:
            row += ["not run", "not run"]
        print(f"| {' | '.join(row)} |", flush=True)


def in_a_process(measure: Callable[..., T], *arguments: int) -> T:
    """Run measure(*arguments) in a new process, whose memory is not used yet, and return its result."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def measure_ours(images: int, captions: int, dim: int, repeats: int) -> tuple[float, float, float, float]:
    """Return seconds of ours and of the bare product, the median of their ratios, and our peak memory in MiB."""
    image_features, text_features, pairs = features(images, captions, dim)
    peak = added_memory(lambda: report(*retrieval_ranks(image_features, text_features, pairs)))
    bare_product(image_features, text_features)
    ours, bare = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: report(*retrieval_ranks(image_features, text_features, pairs))))
        bare.append(seconds(lambda: bare_product(image_features, text_features)))
    return median(ours), median(bare), median(a / b for a, b in zip(ours, bare)), peak


def measure_peer(images: int, captions: int, dim: int) -> tuple[str, str]:
    """Return clip-benchmark's seconds and peak memory in MiB, as table cells."""
    try:
        from clip_benchmark.metrics import zeroshot_retrieval as peer
    except ImportError:
        return "not installed", ""
    image_features, text_features, pairs = features(images, captions, dim)

    def evaluate() -> None:
        scores = text_features @ image_features.t()
        positive_pairs = torch.zeros_like(scores, dtype=torch.bool)
        positive_pairs[torch.arange(captions), pairs[:, 0]] = True
        for k in (1, 5, 10):
            for x, y in ((scores, positive_pairs), (scores.T, positive_pairs.T)):
                (peer.batchify(peer.recall_at_k, x, y, 64, "cpu", k=k) > 0).float().mean().item()

    took = []
    peak = added_memory(lambda: took.append(seconds(evaluate)))
    return f"{took[0]:.1f}", f"{peak:.0f}"


def features(images: int, captions: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw normalised features (images, dim), (captions, dim), similar to a trained model's, and pairs (captions, 2).

    Images are clustered by subject, images and captions have different means (the modality gap), captions are noisier.
    """
    torch.manual_seed(0)
    subjects = torch.randn(images // 25 + 1, dim)[torch.randint(images // 25 + 1, (images,))]
    content = 0.8 * subjects + torch.randn(images, dim)
    owner = torch.arange(captions) * images // captions
    pictures = content + 1.5 * torch.randn(dim) + 2.3 * torch.randn(images, dim)
    texts = torch.randn(captions, dim).mul_(3.4).add_(content[owner]).add_(1.5 * torch.randn(dim))
    normalize = torch.nn.functional.normalize
    return normalize(pictures), normalize(texts), torch.stack([owner, torch.arange(captions)], dim=1)


def bare_product(image_features: Tensor, text_features: Tensor) -> None:
    height, width = tile_size(image_features.device)
    scores = torch.empty(height * width)
    for rows in image_features.split(height):
        for columns in text_features.split(width):
            torch.mm(rows, columns.T, out=scores[: len(rows) * len(columns)].view(len(rows), len(columns)))


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def added_memory(run: Callable[[], object]) -> float:
    """Run `run`; return the largest growth of the resident memory of this process, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """Read a field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
