"""The first ten items of every query, both ways, from feature files to prediction files, beside cn-clip's scripts.

pip install --no-deps cn-clip
python benchmarks/knn.py [--sizes 5000/25000 30000/150000] [--folder /tmp]

Prints a Markdown table. Features are drawn at random, in clusters (see ranks.py), and written as JSON lines to a folder
that is taken away in the end (7 KB an item: 1.3 GB for the larger size). Times are of whole programs, started anew:
"ours" is scripts/make_topk_predictions.py with both outputs, from JSON lines and from .npy; cn-clip's are
make_topk_predictions.py and make_topk_predictions_tr.py, with what they send to a GPU left on the CPU where there is
none. They take a query after the other, so that where the whole would take longer than --patience seconds, its time is
that of the first queries, and of reading, extrapolated: "~" says so. Peak memory is that of our process, from JSON
lines, all told (the processes that help it to read come on top, for a moment).

"search" is what is left without start and reading: of cn-clip's the time for a query, measured as the difference to a
run without queries, and of ours `nearest` with the features in memory.

"same" compares the lists of all queries that cn-clip did; R@K, both directions, is that of its evaluation scripts and
of ours, over these queries, and a difference is said aloud.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

# Read when torch loads, here and in the programs that are timed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ranks import features, in_a_process, seconds

from clip_retrieval.retrieval.features import write_features

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
K = 10
# Runs one of their scripts on a machine with or without a GPU.
PEER = """
import runpy, sys, torch
if not torch.cuda.is_available():
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@dataclass
class Direction:
    """How one direction is called: its name, its query's key, and the module of cn-clip that does it."""

    name: str
    kind: str
    peer: str
    peer_evaluation: str

    @property
    def query_key(self) -> str:
        return f"{self.kind}_id"


T2I = Direction("t2i", "text", "cn_clip.eval.make_topk_predictions", "cn_clip.eval.evaluation")
I2T = Direction("i2t", "image", "cn_clip.eval.make_topk_predictions_tr", "cn_clip.eval.evaluation_tr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["5000/25000", "30000/150000"], metavar="IMAGES/TEXTS")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--patience", type=float, default=120, help="seconds for each script of cn-clip")
    parser.add_argument("--folder", type=Path, help="where the files go (default: the system's)")
    args = parser.parse_args()
    has_peer = importlib.util.find_spec("cn_clip") is not None
    if not has_peer:
        print("cn-clip is not installed (pip install --no-deps cn-clip): ours alone\n")
    columns = ("cn-clip t2i (s)", "cn-clip i2t (s)", "ours, both (s)", "times faster", "from .npy (s)", "times faster")
    columns += ("search: cn-clip (s)", "ours (s)", "times faster")
    print("| images / texts |", " | ".join(columns), "| peak (MiB) | same | t2i R@1, 5, 10 | i2t R@1, 5, 10 |")
    print("|---" * (len(columns) + 5) + "|")
    for size in args.sizes:
        images, texts = (int(number) for number in size.split("/"))
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print(f"| {' | '.join(measure(Path(folder), images, texts, args, has_peer))} |", flush=True)


def measure(folder: Path, images: int, texts: int, args: argparse.Namespace, has_peer: bool) -> list[str]:
    """The cells of a row."""
    write_files(folder, images, texts, args.dim)
    outputs = ("--output", folder / "ours_t2i.jsonl", "--tr_output", folder / "ours_i2t.jsonl")
    took_by, peaks = {}, {}
    for suffix in (".npy", ".jsonl"):
        feats = ("--image_feats", folder / f"image_features{suffix}", "--text_feats", folder / f"text_features{suffix}")
        took_by[suffix], peaks[suffix] = timed(
            sys.executable, SCRIPTS / "make_topk_predictions.py", *feats, "--top_k", K, *outputs
        )
    peer, search, same, recalls = [], 0.0, [0, 0], []
    for direction in (T2I, I2T):
        done = queries = texts if direction is T2I else images
        if has_peer:
            took, each, done = time_peer(folder, direction, queries, args.patience)
            search += each * queries
            peer.append((took, done < queries))
            for ours, theirs in zip(lines(folder / f"ours_{direction.name}.jsonl"), lines(folder / "theirs.jsonl")):
                same[0] += ours == theirs
                same[1] += 1
        recalls.append(recall(folder, direction, done, has_peer))
    total = sum(took for took, _ in peer)
    rough = "~" if any(extrapolated for _, extrapolated in peer) else ""
    cells = [f"{'~' if extrapolated else ''}{took:,.0f}" for took, extrapolated in peer] or ["not installed"] * 2
    for suffix in (".jsonl", ".npy"):
        cells += [f"{took_by[suffix]:.1f}", f"{rough}{total / took_by[suffix]:,.0f}" if peer else ""]
    ours = in_a_process(search_seconds, images, texts, args.dim)
    cells += [f"{rough}{search:,.1f}" if peer else "", f"{ours:.2f}", f"{rough}{search / ours:,.0f}" if peer else ""]
    return [f"{images:,} / {texts:,}", *cells, f"{peaks['.jsonl']:,.0f}", f"{same[0]:,} of {same[1]:,}", *recalls]


def search_seconds(images: int, texts: int, dim: int) -> float:
    """Seconds of ours for both directions, with the features in memory; a first, small search warms up."""
    import torch

    from clip_retrieval.evaluation.neighbours import nearest
    from clip_retrieval.evaluation.scores import Features

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image_features, text_features, _ = features(images, texts, dim)

    def search(number: int) -> None:
        sides = (Features(side[:number], device, "item", str) for side in (image_features, text_features))
        nearest(*sides, K)

    search(1000)
    return seconds(lambda: search(texts))


def write_files(folder: Path, images: int, texts: int, dim: int) -> None:
    """Features in both formats, and the answers."""
    image_features, text_features, pairs = features(images, texts, dim)
    for suffix in (".jsonl", ".npy"):
        write_features(folder / f"image_features{suffix}", "image", range(images), image_features.numpy())
        write_features(folder / f"text_features{suffix}", "text", range(texts), text_features.numpy())
    with (folder / "gold_texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text_id": text, "image_ids": [image]}) + "\n" for image, text in pairs.tolist())
    timed(sys.executable, SCRIPTS / "transform_ir_annotation_to_tr.py", "--input", folder / "gold_texts.jsonl")


def time_peer(folder: Path, direction: Direction, queries: int, patience: float) -> tuple[float, float, int]:
    """Seconds of cn-clip for all queries and for one, and how many it did: more and more, within its time."""
    started, done, took = run_peer(folder, direction, 0), 0, 0.0
    number = min(queries, 20)
    while True:
        took, done = run_peer(folder, direction, number), number
        each = max(took - started, 1e-3) / done
        if done == queries or took - started > patience / 4:
            return (took if done == queries else started + each * queries), each, done
        # (A few queries say little of all: what a run takes beside them varies by more.)
        number = min(queries, max(2 * done, min(int(patience / each), 10 * done)))


def run_peer(folder: Path, direction: Direction, queries: int) -> float:
    """Seconds of cn-clip for the first queries, into theirs.jsonl."""
    files = {kind: folder / f"{kind}_features.jsonl" for kind in ("image", "text")}
    with files[direction.kind].open() as file, (folder / "first.jsonl").open("w") as first:
        first.writelines(islice(file, queries))
    files[direction.kind] = folder / "first.jsonl"
    feats = (f"--image-feats={files['image']}", f"--text-feats={files['text']}")
    options = (*feats, f"--top-k={K}", "--eval-batch-size=32768", f"--output={folder / 'theirs.jsonl'}")
    return timed(sys.executable, "-c", PEER, direction.peer, *options)[0]


def recall(folder: Path, direction: Direction, queries: int, has_peer: bool) -> str:
    """R@1, 5, 10 of the first queries, by both evaluations, of our predictions and of theirs."""
    gold = folder / ("gold_texts.jsonl" if direction is T2I else "gold_texts.tr.jsonl")
    with (folder / "gold.jsonl").open("w") as file:
        records = (json.loads(line) for line in gold.read_text().splitlines())
        file.writelines(json.dumps(r) + "\n" for r in records if r[direction.query_key] < queries)
    ours, output = folder / f"ours_{direction.name}.jsonl", folder / "scores.json"
    timed(sys.executable, SCRIPTS / "evaluate_predictions.py", folder / "gold.jsonl", ours, output)
    scores = [json.loads(output.read_text())["scoreJson"]]
    for predictions in (ours, folder / "theirs.jsonl") if has_peer else ():
        timed(sys.executable, "-c", PEER, direction.peer_evaluation, folder / "gold.jsonl", predictions, output)
        scores.append(json.loads(output.read_text())["scoreJson"])
    found = [[f"{s[k]:.2f}" for k in ("r1", "r5", "r10")] for s in scores]
    cell = ", ".join(found[0])
    return cell if all(other == found[0] for other in found) else f"{cell} NOT THE SAME: {found[1:]}"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timed(*command: object) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a program that must succeed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([str(part) for part in command], stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))}\n{said.read().decode(errors='replace')}")
    return took, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
