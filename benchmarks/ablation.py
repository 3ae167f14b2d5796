"""Finetune one small model with the plain recipe and with each ingredient of docs/recipes.md, over three seeds.

python benchmarks/ablation.py OUTPUT [--dataset_root $CLIP_RETRIEVAL_DATA/flickr8k] [--seeds 1,2,3]

The starting model is trained here, on every second of Flickr8K's 6,000 training images and on drawn shapes; the
finetunes see the other 3,000 images. Retention is the rsum on shapes. Writes OUTPUT/sweep/table.md; the same command
resumes. About two hours on one core.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 80, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
BOTH = (
    "--caption_sampling one --batch_size 128 --eps 1e-8 --weight_decay 0.1 --warmup 0.1 --decoder fast --num_workers 0"
)
START = "--dataset shapes --annotations auto --image_dir auto --augment crop --epochs 14 --lr 1e-3 --eval_every 7"
FINETUNE = "--max_steps 64 --lr 3e-4 --no_eval_first --eval_every 0 --retention_dataset shapes"
INGREDIENTS = (
    # which weights move, and how
    "trainable=lora lora_targets=all lr=3e-3",
    "trainable=bitfit lr=3e-3",
    "unlocked_image_blocks=2 unlocked_text_blocks=2",
    "layer_decay=0.75",
    "optimizer=lion lr=1e-4 weight_decay=0.3 eps=1e-6",
    "optimizer=muon",
    # what is averaged
    "ema=0.9",
    # what is seen
    "augment=crop",
    "augment=rand",
    "word_dropout=0.1",
    "drop_path=0.1",
    "patch_dropout=0.25",
    "start_image_size=48",
    "hard_negatives=0.5",
    # what is minimised
    "label_smoothing=0.1",
    "loss=siglip",
    "loss=triplet",
    "distill_from=start",
    # several together
    "layer_decay=0.75 ema=0.9 drop_path=0.1 augment=crop",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--dataset_root", type=Path, default=Path(os.environ.get("CLIP_RETRIEVAL_DATA", "")) / "flickr8k"
    )
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--ablate", nargs="+", default=INGREDIENTS)
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    # the halves of the training images, with the same val and test splits
    images = json.loads((args.dataset_root / "dataset_flickr8k.json").read_text(encoding="utf-8"))["images"]
    train = [image for image in images if image["split"] == "train"]
    write_csv(output / "first.csv", train[0::2], images)
    write_csv(output / "second.csv", train[1::2], images)
    (output / "model.json").write_text(json.dumps(MODEL))
    files = ["--dataset", "csv", "--image_dir", str(args.dataset_root / "images"), *BOTH.split()]
    files += ["--image_cache", str(output / "cache")]

    # the starting model
    start = [*files, "--annotations", str(output / "first.csv"), "--vision_model", str(output / "model.json")]
    place = ["--checkpoint_path", str(output), "--experiments", "start", "--resume", "auto"]
    run("main.py", *start, *START.split(), *place)

    # the finetunes
    shared = [*files, "--annotations", str(output / "second.csv"), "--pretrained", str(output / "start" / "last.pt")]
    values = ["--values", f"seed={args.seeds}", "--ablate", *args.ablate, "--output", str(output / "sweep")]
    run("scripts/sweep.py", *values, "--", *shared, *FINETUNE.split())


def write_csv(path: Path, train: list, images: list) -> None:
    """Write the captions of the training images, and of all val and test images."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for image in [*train, *(image for image in images if image["split"] != "train")]:
            writer.writerows([image["filename"], each["raw"], image["split"]] for each in image["sentences"])


def run(program: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / program), *arguments], check=True)


if __name__ == "__main__":
    main()
