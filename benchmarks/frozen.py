"""Training behind frozen towers: their outputs kept, beside encoding again in every epoch.

python benchmarks/frozen.py [--dataset_root $CLIP_RETRIEVAL_DATA/coco_mini] [--vision_model ViT-B/32] [--epochs 3]

Runs `main.py --trainable linear_projection` and `--trainable adaptor` twice each, with and without --no_feature_cache,
on random weights (the time does not depend on them), and prints a Markdown table: pairs per second over the second and
later epochs, their ratio, and by how much the weights differ in the end.
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
    print("| what learns | kept (pairs/s) | encoded again (pairs/s) | ratio | largest difference of a weight |")
    print("|---|---|---|---|---|")
    for trainable in ("linear_projection", "adaptor"):
        with tempfile.TemporaryDirectory() as folder:
            kept, kept_weights = measure(args, trainable, folder, "kept")
            again, again_weights = measure(args, trainable, folder, "again", "--no_feature_cache")
        difference = max((kept_weights[name] - again_weights[name]).abs().max().item() for name in kept_weights)
        print(f"| {trainable} | {kept:,.0f} | {again:.1f} | {kept / again:,.0f} | {difference:.1e} |", flush=True)


def measure(args: argparse.Namespace, trainable: str, folder: str, name: str, *extra: str) -> tuple[float, dict]:
    """Pairs per second from the second epoch on, and the weights at the end."""
    command = [sys.executable, str(ROOT / "main.py"), "--dataset_root", str(args.dataset_root)]
    command += ["--vision_model", args.vision_model, "--pretrained", "none", "--trainable", trainable]
    command += ["--batch_size", str(args.batch_size), "--epochs", str(args.epochs), "--eval_every", "0"]
    command += [
        "--caption_sampling",
        "one",
        "--no_eval_first",
        "--eps",
        "1e-3",
        "--lr",
        "1e-3",
        "--warmup",
        "0.1",
        "--display",
        "1",
    ]
    command += ["--checkpoint_path", folder, "--experiments", name, *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in Path(folder, name, "metrics.jsonl").read_text().splitlines()]
    seconds = [1 / line["pairs_per_second"] for line in lines if line["kind"] == "train" and line["epoch"] > 1]
    weights = torch.load(Path(folder, name, "last.pt"), weights_only=True)["model"]
    return len(seconds) / sum(seconds), {name: value.float() for name, value in weights.items()}


if __name__ == "__main__":
    main()
