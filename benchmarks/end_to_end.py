"""Pairs per second of main.py on photographs, beside its training step alone and open_clip's loader on the same files.

python benchmarks/end_to_end.py FOLDER [--annotations FILE] [--models ViT-B/32 ViT-L/14] [--rows pillow fast ...]

FOLDER is a data set with a Karpathy JSON (--annotations names it if there are several). Prints a Markdown table. "step
alone" is `Trainer.step` on batches that are on the device (see train_step.py). The other rows of ours are whole runs of
main.py in a process of their own; pairs/s is the median of their log lines from step 21 on, "first 20 steps" the
seconds from the start of the process to the log line of step 20: imports, model, data, workers and the first steps. The
row "image_cache" reads a cache that a run before it has built; "built in" is the time of that. "open_clip's loader" is
the DataLoader of its training on a CSV with the same pairs, with as many workers; no model runs beside it.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from karpathy import read_part
from open_clip import get_tokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch.utils.data import DataLoader
from train_step import Data, our_step

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_retrieval.data.workers import default_num_workers
from clip_retrieval.device import choose_device, choose_precision, device_name
from clip_retrieval.models.build import build_model
from clip_retrieval.options import ModelOptions

ROOT = Path(__file__).resolve().parents[1]
ROWS = ("step", "pillow", "fast", "gpu", "image_cache", "open_clip")
STEPS_AT_START = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--annotations", type=Path, help="default: the folder's only Karpathy JSON")
    parser.add_argument("--models", nargs="+", default=["ViT-B/32", "ViT-L/14"], help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run, over 20, default: %(default)s")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all; gpu on CUDA only")
    parser.add_argument("--num_workers", type=int, help="default: that of main.py")
    parser.add_argument("--device", help="default: the best available")
    args = parser.parse_args()
    annotations = args.annotations or next(args.folder.glob("dataset_*.json"))
    device = choose_device(args.device)
    workers = default_num_workers(device) if args.num_workers is None else args.num_workers

    print(f"{device_name(device)}, {os.cpu_count()} cores, {workers} workers, torch {torch.__version__}; ", end="")
    print(f"{annotations.name}\n")
    print("| model | batch | row | pairs/s | of the step alone | data (%) | first 20 steps (s) |")
    print("|---|---|---|---|---|---|---|")
    for model in args.models:
        alone = None
        for row in args.rows or [row for row in ROWS if row != "gpu" or device.type == "cuda"]:
            if row == "step":
                rate, lost, start = time_step(model, annotations, args.batch_size, device), None, None
                alone = rate
            elif row == "open_clip":
                rate, lost, start = time_open_clip_loader(model, args, annotations, workers), None, None
            else:
                rate, lost, start = time_run(model, row, args, annotations, workers)
            cells = [model, args.batch_size, row, f"{rate:,.0f}", f"{rate / alone:.2f}" if alone else ""]
            cells += ["" if lost is None else f"{lost:.0f}", "" if start is None else f"{start:.1f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def time_step(model: str, annotations: Path, batch_size: int, device: torch.device, steps: int = 8) -> float:
    """Pairs per second of the training step on batches that are on the device."""
    built = build_model(ModelOptions(vision_model=model, pretrained="none"))
    data = Data(built, annotations, batch_size, 4, device)
    step = our_step("ours", built, data, choose_precision("auto", device), device)
    return batch_size * rate_of(step, steps, device)


def rate_of(step: Callable[[int], object], steps: int, device: torch.device) -> float:
    """Steps per second, after a warm-up."""
    for number in range(steps):
        step(number)
    synchronize(device)
    started = time.perf_counter()
    for number in range(steps):
        step(number)
    synchronize(device)
    return steps / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_run(
    model: str, row: str, args: argparse.Namespace, annotations: Path, workers: int
) -> tuple[float, float, float]:
    """Pairs per second, percent lost to loading and seconds to step 20 of main.py."""
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, ROOT / "main.py", "--dataset", "karpathy", "--dataset_root", args.folder]
        command += ["--annotations", annotations, "--vision_model", model, "--pretrained", "none", "--no_eval_first"]
        command += ["--batch_size", args.batch_size, "--num_workers", workers, "--max_steps", args.steps]
        command += ["--checkpoint_path", logs, "--display", "5", "--eval_every", "0"]
        command += [] if args.device is None else ["--device", args.device]
        if row in ("fast", "gpu"):
            command += ["--decoder", row]
        if row == "image_cache":
            command += ["--image_cache", Path(logs, "cache")]
            started = time.time()
            watch_run([*command, "--experiments", "builds"], Path(logs, "builds"), steps=0)
            print(f"(image cache built in {time.time() - started:.0f} s, start included)", file=sys.stderr)
        return watch_run([*command, "--experiments", "run"], Path(logs, "run"), args.steps)


def watch_run(command: list, folder: Path, steps: int) -> tuple[float, float, float]:
    """Run main.py until its last step's log line; return median pairs/s and loss after step 20, and seconds to it."""
    started, at_step_20, lines = time.perf_counter(), 0.0, []
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while process.poll() is None:
            time.sleep(0.05)
            lines = train_lines(folder)
            if not at_step_20 and any(line["step"] >= STEPS_AT_START for line in lines):
                at_step_20 = time.perf_counter() - started
            if lines and lines[-1]["step"] >= steps:
                break
    finally:
        process.kill()
        output = process.communicate()[0]
    steady = [line for line in lines if line["step"] > STEPS_AT_START] or lines
    if not steady:
        sys.exit(output)
    return median(x["pairs_per_second"] for x in steady), median(x["data_percent"] for x in steady), at_step_20


def train_lines(folder: Path) -> list[dict]:
    """The log lines of training so far."""
    path = folder / "metrics.jsonl"
    content = path.read_text().splitlines() if path.is_file() else []
    return [line for line in map(json.loads, content) if line["kind"] == "train"]


def time_open_clip_loader(model: str, args: argparse.Namespace, annotations: Path, workers: int) -> float:
    """Pairs per second of open_clip's DataLoader for CSV files, without a model."""
    from open_clip_train.data import CsvDataset

    built = build_model(ModelOptions(vision_model=model, pretrained="none"))
    transform = image_transform_v2(PreprocessCfg(**built.preprocess), is_train=True)
    part = read_part(annotations, "train")
    with tempfile.NamedTemporaryFile("w", suffix=".csv", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("filepath", "title"))
        folder = args.folder / "images"
        for image, text in part.pairs:
            writer.writerow((folder / part.names[image], part.texts[text]))
        file.flush()
        pairs = CsvDataset(
            file.name, transform, "filepath", "title", tokenizer=get_tokenizer(built.name.replace("/", "-"))
        )
    loader = DataLoader(pairs, args.batch_size, shuffle=True, num_workers=workers, pin_memory=True, drop_last=True)
    batches = iter(loader)
    for _ in islice(batches, max(2, workers)):
        pass  # start-up, and what the workers load ahead
    started, number = time.perf_counter(), 0
    for _ in islice(batches, args.steps):
        number += 1
    return number * args.batch_size / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
