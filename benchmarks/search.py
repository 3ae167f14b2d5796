"""Time of a query in an index of random features: text encoding, exact search and FAISS.

python benchmarks/search.py --images 100000 --vision_model ViT-B/32 --pretrained none
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_retrieval.search.encoder import Encoder
from clip_retrieval.search.index import INDEX, Entry, write_table
from clip_retrieval.search.query import Gallery

BLOCK = 2**14


def make_index(folder: Path, images: int, source: dict) -> None:
    """Write an index of images that do not exist."""
    torch.manual_seed(0)  # of random weights
    record = Encoder(source, {"device": "cpu"}).record
    entries = [Entry(f"{n // 1000}/{n}.jpg", n, n, f"{n:032x}", 640, 480) for n in range(images)]
    rng = np.random.default_rng(0)

    def blocks():
        for start in range(0, images, BLOCK):
            features = rng.standard_normal((min(BLOCK, images - start), record["dim"]), np.float32)
            yield features / np.linalg.norm(features, axis=1, keepdims=True)

    write_table(folder / INDEX, record, entries, record["dim"], blocks())


def measure(run, repeats: int = 30) -> str:
    """Run a few times to warm up, then return the times in milliseconds."""
    times, processor = [], []
    for _ in range(repeats + 3):
        start, used = time.perf_counter(), time.process_time()
        run()
        times.append(1000 * (time.perf_counter() - start))
        processor.append(1000 * (time.process_time() - used))  # of all cores; not affected by other programs' load
    median, cpu = statistics.median(times[3:]), statistics.median(processor[3:])
    return f"median {median:.1f} ms, longest {max(times[3:]):.1f} ms, processor {cpu:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--vision_model", default="ViT-B/32")
    parser.add_argument("--pretrained", default="none")
    parser.add_argument("--faiss", action="store_true", help="also build a FAISS index, which takes minutes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = {"options": {"vision_model": args.vision_model, "pretrained": args.pretrained}, "stamp": []}
        make_index(folder, args.images, source)
        torch.manual_seed(0)
        start = time.perf_counter()
        gallery = Gallery(folder, folder, {"device": "cpu"})
        print(f"{args.images:,} images of {gallery.features.shape[1]} dimensions")
        print(f"reading the index and loading the model: {time.perf_counter() - start:.1f} s")
        query = gallery.encode_query(["a dog on the beach"])
        print("encoding the text:", measure(lambda: gallery.encode_query(["a dog on the beach"])))
        print("exact search:", measure(lambda: gallery.search(query, 60)))
        if args.faiss:
            start = time.perf_counter()
            exact = set(gallery.search(query, 60)[0].tolist())
            gallery.accelerate(True)
            print(f"building the FAISS index: {time.perf_counter() - start:.0f} s")
            found = set(gallery.search(query, 60)[0].tolist())
            print("FAISS search:", measure(lambda: gallery.search(query, 60)), f"{len(exact & found)} of the exact 60")
            start = time.perf_counter()
            gallery.accelerate(True)
            print(f"reading it from its file: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
