"""Top-10 predictions in both directions, from feature files to prediction files, compared with cn-clip's scripts.

pip install --no-deps cn-clip
python benchmarks/knn.py [--sizes 5000/25000 30000/150000] [--folder /tmp]

Prints a Markdown table. Features are random clusters (see ranks.py), written as JSON lines to a temporary folder (7 KB
per item, 1.3 GB for the larger size). Times are of whole programs. "ours" is scripts/make_topk_predictions.py with both
outputs, from JSON lines and from .npy. cn-clip's are make_topk_predictions.py and make_topk_predictions_tr.py, on the
CPU if there is no GPU. They process one query at a time. If all queries would take longer than --patience seconds, the
time of the first ones is extrapolated and marked with "~". Peak memory is that of our main process, from JSON lines.

"search" excludes start and reading: for cn-clip the time per query, from the difference to a run without queries; for
ours `nearest` with the features in memory.

"same" compares the lists of all queries that cn-clip processed. R@K of both directions is computed by its evaluation
scripts and by ours over these queries; a difference is marked with "NOT THE SAME".
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

# torch reads it when it loads, here and in the timed programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ranks import features, in_a_process, seconds

from clip_retrieval.retrieval.features import write_features

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
K = 10
# Runs one of cn-clip's scripts, on a CPU if there is no GPU.
PEER = """
import runpy, sys, torch
if not torch.cuda.is_available():
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@dataclass
class Direction:
    """A direction: its name, the kind of its queries, and cn-clip's modules for it."""

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
    parser.add_argument("--folder", type=Path, help="folder for temporary files (default: the system's)")
    args = parser.parse_args()
    has_peer = importlib.util.find_spec("cn_clip") is not None
    if not has_peer:
        print("cn-clip is not installed (pip install --no-deps cn-clip): ours alone\n")
    columns = ["cn-clip t2i (s)", "cn-clip i2t (s)", "ours, both (s)", "speedup", "from .npy (s)", "speedup"]
    columns += ["search: cn-clip (s)", "ours (s)", "speedup"]
    print("| images / texts |", " | ".join(columns), "| peak (MiB) | same | t2i R@1, 5, 10 | i2t R@1, 5, 10 |")
    print("|---" * (len(columns) + 5) + "|")
    for size in args.sizes:
        images, texts = (int(number) for number in size.split("/"))
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print(f"| {' | '.join(measure(Path(folder), images, texts, args, has_peer))} |", flush=True)


def measure(folder: Path, images: int, texts: int, args: argparse.Namespace, has_peer: bool) -> list[str]:
    """Measure one size; return the cells of its row."""
    # ours, from both formats
    write_files(folder, images, texts, args.dim)
    outputs = ("--output", folder / "ours_t2i.jsonl", "--tr_output", folder / "ours_i2t.jsonl")
    seconds_by_suffix, peaks = {}, {}
    for suffix in (".npy", ".jsonl"):
        feats = ("--image_feats", folder / f"image_features{suffix}", "--text_feats", folder / f"text_features{suffix}")
        seconds_by_suffix[suffix], peaks[suffix] = timed(
            sys.executable, SCRIPTS / "make_topk_predictions.py", *feats, "--top_k", K, *outputs
        )

    # cn-clip, and the comparison of its predictions with ours
    peer, search, same, recalls = [], 0.0, [0, 0], []
    for direction in (T2I, I2T):
        done = queries = texts if direction is T2I else images
        if has_peer:
            took, each, done = time_peer(folder, direction, queries, args.patience)
            search += each * queries
            peer.append((took, done < queries))
            files = (folder / f"ours_{direction.name}.jsonl", folder / "theirs.jsonl")
            for ours, theirs in zip(*map(read_json_lines, files)):
                same[0] += ours == theirs
                same[1] += 1
        recalls.append(recall(folder, direction, done, has_peer))

    # the cells
    total = sum(took for took, _ in peer)
    rough = "~" if any(extrapolated for _, extrapolated in peer) else ""
    cells = [f"{'~' if extrapolated else ''}{took:,.0f}" for took, extrapolated in peer] or ["not installed"] * 2
    for suffix in (".jsonl", ".npy"):
        took = seconds_by_suffix[suffix]
        cells += [f"{took:.1f}", f"{rough}{total / took:,.0f}" if peer else ""]
    ours = in_a_process(search_seconds, images, texts, args.dim)
    cells += [f"{rough}{search:,.1f}" if peer else "", f"{ours:.2f}", f"{rough}{search / ours:,.0f}" if peer else ""]
    return [f"{images:,} / {texts:,}", *cells, f"{peaks['.jsonl']:,.0f}", f"{same[0]:,} of {same[1]:,}", *recalls]


def search_seconds(images: int, texts: int, dim: int) -> float:
    """Seconds of our search in both directions, with the features in memory, after a small warm-up search."""
    import torch

    from clip_retrieval.evaluation.neighbours import nearest
    from clip_retrieval.evaluation.scores import Features

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image_features, text_features, _ = features(images, texts, dim)

    def search(number: int) -> None:
        images, texts = (Features(rows[:number], device, "item", str) for rows in (image_features, text_features))
        nearest(images, texts, K)

    search(1000)
    return seconds(lambda: search(texts))


def write_files(folder: Path, images: int, texts: int, dim: int) -> None:
    """Write features in both formats, and the relevant pairs."""
    image_features, text_features, pairs = features(images, texts, dim)
    for suffix in (".jsonl", ".npy"):
        write_features(folder / f"image_features{suffix}", "image", range(images), image_features.numpy())
        write_features(folder / f"text_features{suffix}", "text", range(texts), text_features.numpy())
    with (folder / "gold_texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text_id": text, "image_ids": [image]}) + "\n" for image, text in pairs.tolist())
    timed(sys.executable, SCRIPTS / "transform_ir_annotation_to_tr.py", "--input", folder / "gold_texts.jsonl")


def time_peer(folder: Path, direction: Direction, queries: int, patience: float) -> tuple[float, float, int]:
    """Seconds of cn-clip for all queries and per query, and the number of processed queries, within `patience`."""
    started, done, took = run_peer(folder, direction, 0), 0, 0.0
    number = min(queries, 20)
    while True:
        took, done = run_peer(folder, direction, number), number
        each = max(took - started, 1e-3) / done
        if done == queries or took - started > patience / 4:
            return (took if done == queries else started + each * queries), each, done
        # A few queries are not enough: the time of start and reading varies by more.
        number = min(queries, max(2 * done, min(int(patience / each), 10 * done)))


def run_peer(folder: Path, direction: Direction, queries: int) -> float:
    """Seconds of cn-clip for the first queries; writes theirs.jsonl."""
    files = {kind: folder / f"{kind}_features.jsonl" for kind in ("image", "text")}
    with files[direction.kind].open() as file, (folder / "first.jsonl").open("w") as first:
        first.writelines(islice(file, queries))
    files[direction.kind] = folder / "first.jsonl"
    feats = (f"--image-feats={files['image']}", f"--text-feats={files['text']}")
    options = (*feats, f"--top-k={K}", "--eval-batch-size=32768", f"--output={folder / 'theirs.jsonl'}")
    return timed(sys.executable, "-c", PEER, direction.peer, *options)[0]


def recall(folder: Path, direction: Direction, queries: int, has_peer: bool) -> str:
    """R@1, R@5, R@10 of the first queries, of our and of their predictions, by both evaluations."""
    gold = folder / ("gold_texts.jsonl" if direction is T2I else "gold_texts.tr.jsonl")
    with (folder / "gold.jsonl").open("w") as file:
        file.writelines(json.dumps(r) + "\n" for r in read_json_lines(gold) if r[direction.query_key] < queries)
    ours, output = folder / f"ours_{direction.name}.jsonl", folder / "scores.json"
    timed(sys.executable, SCRIPTS / "evaluate_predictions.py", folder / "gold.jsonl", ours, output)
    scores = [json.loads(output.read_text())["scoreJson"]]
    for predictions in (ours, folder / "theirs.jsonl") if has_peer else ():
        timed(sys.executable, "-c", PEER, direction.peer_evaluation, folder / "gold.jsonl", predictions, output)
        scores.append(json.loads(output.read_text())["scoreJson"])
    found = [[f"{s[k]:.2f}" for k in ("r1", "r5", "r10")] for s in scores]
    cell = ", ".join(found[0])
    return cell if all(other == found[0] for other in found) else f"{cell} NOT THE SAME: {found[1:]}"


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timed(*command: object) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a program that must succeed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))}\n{output.read().decode(errors='replace')}")
    return took, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
