"""Training on frozen towers: cached features compared with encoding in every epoch.

python benchmarks/frozen.py [--dataset_root $CLIP_RETRIEVAL_DATA/coco_mini] [--vision_model ViT-B/32] [--epochs 3]

Runs `main.py --trainable linear_projection` and `--trainable adaptor` twice each, with and without --no_feature_cache,
on random weights (they do not change the time), and prints a Markdown table: pairs per second from the second epoch on,
their ratio, and the largest difference between the final weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset_root", default=Path(os.environ.get("CLIP_RETRIEVAL_DATA", ""), "coco_mini"))
    parser.add_argument("--vision_model", default="ViT-B/32")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    print("| trainable | cached (pairs/s) | encoded again (pairs/s) | ratio | largest difference of a weight |")
    print("|---|---|---|---|---|")
    for trainable in ("linear_projection", "adaptor"):
        with tempfile.TemporaryDirectory() as folder:
            cached, cached_weights = measure(args, trainable, folder, "cached")
            again, again_weights = measure(args, trainable, folder, "again", "--no_feature_cache")
        difference = max((cached_weights[name] - again_weights[name]).abs().max().item() for name in cached_weights)
        print(f"| {trainable} | {cached:,.0f} | {again:.1f} | {cached / again:,.0f} | {difference:.1e} |", flush=True)


def measure(args: argparse.Namespace, trainable: str, folder: str, name: str, *extra: str) -> tuple[float, dict]:
    """Pairs per second from the second epoch on, and the weights at the end."""
    command = [sys.executable, str(ROOT / "main.py"), "--dataset_root", str(args.dataset_root)]
    command += ["--vision_model", args.vision_model, "--pretrained", "none", "--trainable", trainable]
    command += ["--batch_size", str(args.batch_size), "--epochs", str(args.epochs), "--eval_every", "0"]
    command += ["--caption_sampling", "one", "--no_eval_first", "--display", "1"]
    command += ["--lr", "1e-3", "--eps", "1e-3", "--warmup", "0.1"]
    command += ["--checkpoint_path", folder, "--experiments", name, *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
    seconds = [1 / line["pairs_per_second"] for line in lines if line["kind"] == "train" and line["epoch"] > 1]
    weights = torch.load(Path(folder, name, "last.pt"), weights_only=True)["model"]
    return len(seconds) / sum(seconds), {name: value.float() for name, value in weights.items()}


if __name__ == "__main__":
    main()
