"""Pairs per second and utilisation of the training step, compared with open_clip's, each optimisation off in turn.

python benchmarks/train_step.py [--models RN50 ViT-B/32 ...] [--batch_sizes 256 1024] [--only open_clip ours ...]

Prints a Markdown table. The weights are random, which does not change the time. Captions, and thus their lengths, are
real: COCO's or Flickr8K's test split in $CLIP_RETRIEVAL_DATA, or any Karpathy JSON (--captions). Pixels are random. All
batches are on the device beforehand: the step is measured, not the loading.

"ours" is `Trainer.step` on batches of the `TrainLoader`. "open_clip" is its training step from its public parts:
normalised images, full-length texts, `model(images, texts)`, `ClipLoss` under autocast, AdamW with its defaults and
open_clip's two groups, and TF32 and cuDNN's algorithm search as in its training. The rows of a model and batch run
interleaved in one process and all stay on the device; "peak" excludes the batches and the memory of the other rows. A
row that is out of memory may fit alone (--only).

MFU is the utilisation on the work that the model of a row needs: three times the FLOPs of the forward pass (the
backward pass counts twice), per second, over the dense bf16 peak of the device (--peak_tflops). For open_clip this
covers all tokens of the full length, for ours the tokens that the features depend on. Further work of our rows
(padding, the second forward pass of --grad_cache) does not count.

OpenAI's weights use QuickGELU, which is not the default of these models: --models ViT-B-32-quickgelu.
"""

import argparse
import copy
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

# torch reads it when it loads. The package sets it too, but is imported after torch here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from karpathy import read_part
from open_clip import ClipLoss, SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_retrieval.data.batches.loader import TrainBatch, TrainLoader
from clip_retrieval.data.batches.sampler import BatchSampler
from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.device import DTYPES, choose_device, choose_precision, device_name, make_scaler
from clip_retrieval.distributed import SINGLE_PROCESS
from clip_retrieval.errors import UserError
from clip_retrieval.models.build import BuiltModel, build_model
from clip_retrieval.models.pooled import BLOCK_FUNCTIONS, Packing
from clip_retrieval.models.tokenizers import build_tokenizer
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import ModelOptions, Options
from clip_retrieval.run.train_parts import COMPILED_LENGTHS, make_trainer
from clip_retrieval.training.optimizer import BETA2, parameter_groups

CAPTIONS = ("coco_text/dataset_coco_karpathy_test.json.gz", "flickr8k/dataset_flickr8k.json")
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312}  # dense bf16
LEARNING_RATE = 1e-6
ROWS = {
    "open_clip": "open_clip",
    "ours": "ours",
    "no_packing": "ours, captions padded to the longest of the batch",
    "no_trim": "ours, captions padded to the context length",
    "all_tokens": "ours, padded to the longest, all tokens in the last block",
    "no_fused": "ours, AdamW not fused",
    "no_channels_last": "ours, without channels_last",
    "varlen": "ours, captions packed for torch's varlen_attn",
    "graph": "ours, CUDA graphs, not compiled",
    "compile": "ours, --compile: CUDA graphs, compiled",
    "grad_cache": "ours, --grad_cache of a quarter",
    "open_clip_bf16": "open_clip, bf16",
    "bf16": "ours, bf16",
}
ON_CUDA = ("no_channels_last", "varlen", "graph", "compile")
ON_AMX = ("open_clip_bf16", "bf16")


class Row:
    """One kind of step and its measurements.

    Attributes:
        seconds: seconds per step, one entry per repeat.
        peak: GiB of GPU memory, without that of other rows.
        out_of_memory: whether the step ran out of memory; it is then skipped.
    """

    def __init__(self, make: Callable[[], Callable[[int], object]], warm_up: int, device: torch.device):
        """`make` returns the step, a function of its number, counted from 0."""
        self.seconds: list[float] = []
        self.peak = 0.0
        self.out_of_memory = False
        self._device, self._make, self._steps_done = device, make, 0
        self._step: Callable[[int], object] | None = None
        before, pools = allocated(device), graph_memory(device)
        self._attempt(warm_up)
        self._held = allocated(device) - before
        self._pool = graph_memory(device) - pools

    def measure(self, steps: int) -> None:
        if self.out_of_memory:
            return
        other_rows = allocated(self._device) - self._held
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        started = time.perf_counter()
        self._attempt(steps)
        self.seconds.append((time.perf_counter() - started) / steps)
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - other_rows + self._pool
            self.peak = max(self.peak, peak / 2**30)

    def _attempt(self, steps: int) -> None:
        try:
            self._step = self._step or self._make()
            for _ in range(steps):
                self._step(self._steps_done)
                self._steps_done += 1
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except torch.OutOfMemoryError:
            self.out_of_memory = True
        if self.out_of_memory:  # after the except block, because the error holds tensors
            self._step = None
            release(self._device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def graph_memory(device: torch.device) -> int:
    """Bytes that CUDA graphs reserve, most of which do not count as allocated between replays."""
    segments = torch.cuda.memory_snapshot() if device.type == "cuda" else []
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", help="default: RN50 ViT-B/32 ViT-B/16 ViT-L/14; on a CPU ViT-B/32")
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="default: 256 1024; on a CPU 16")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, help="default: all that the device supports (no --compile on a CPU)"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="default: auto")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="steps per repeat, default: %(default)s")
    parser.add_argument("--device", help="default: the best available")
    parser.add_argument("--captions", type=Path, help="a Karpathy JSON, default: in $CLIP_RETRIEVAL_DATA")
    parser.add_argument("--peak_tflops", type=float, help="default: known for H200, H100 and A100")
    args = parser.parse_args()

    # settings
    device = choose_device(args.device)
    on_cuda = device.type == "cuda"
    precision = choose_precision(args.precision, device)
    captions = args.captions or find_captions()
    if captions is None:
        parser.error(f"no {' nor '.join(CAPTIONS)} in $CLIP_RETRIEVAL_DATA; give --captions")
    peak = args.peak_tflops or next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name(device)), None)
    names = args.only or default_rows(device)

    # head of the table
    print(f"{device_name(device)}, {precision}, {torch.get_num_threads()} threads, torch {torch.__version__}; ", end="")
    print(f"captions of {captions.name}; medians of {args.repeats} repeats of {args.steps} steps")
    if device.type == "cpu" and not has_amx():
        print("bf16 is not measured: this CPU has no AMX")
    print("\n| model | batch | step | pairs/s | ratio to open_clip | MFU (%) | peak memory (GiB) |")
    print("|---|---|---|---|---|---|---|")

    # rows of each model and batch size
    for model in args.models or (["RN50", "ViT-B/32", "ViT-B/16", "ViT-L/14"] if on_cuda else ["ViT-B/32"]):
        torch.manual_seed(0)
        built = build_model(ModelOptions(vision_model=model, pretrained="none"))
        for batch_size in args.batch_sizes or ([256, 1024] if on_cuda else [16]):
            data = Data(built, captions, batch_size, args.steps, device)
            rows = {name: make_row(name, built, data, precision, device) for name in names}
            for _ in range(args.repeats):
                for row in rows.values():
                    row.measure(args.steps)
            flops = needed_flops(built, data) if peak else None
            print_rows(f"{model} | {batch_size:,}", rows, batch_size, flops, peak)
            rows.clear()
            release(device)


def find_captions() -> Path | None:
    folder = Path(os.environ.get("CLIP_RETRIEVAL_DATA", "."))
    return next((folder / name for name in CAPTIONS if (folder / name).is_file()), None)


def has_amx() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def default_rows(device: torch.device) -> list[str]:
    skipped = ON_AMX if device.type == "cuda" else ON_CUDA if has_amx() else ON_CUDA + ON_AMX
    return [name for name in ROWS if name not in skipped]


class Data:
    """The first batches of an epoch on the device, the same pairs in the form that each row needs."""

    def __init__(
        self,
        built: BuiltModel,
        captions: Path,
        batch_size: int,
        number: int,
        device: torch.device,
    ):
        part = read_part(captions)
        images = ImageArray(np.empty((len(part.names), 0, 0, 3), np.uint8), "random")
        self._sampler = BatchSampler(RetrievalDataset("benchmark", "test", images, part.texts, part.pairs), batch_size)
        self._tokens = tokenize(part.texts, make_tokenizer(built))
        self._pixels = RandomPixels(built.preprocess["size"])
        self._number, self._device = number, device
        self.trimmed = self._batches(trim=True)
        self.full = self._batches(trim=False)
        self.bucketed = self._batches(trim=True, bucket=COMPILED_LENGTHS)
        mean, std = (torch.tensor(built.preprocess[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
        self.normalised = [((batch.images / 255 - mean) / std, batch.texts) for batch in self.full]

    def _batches(self, *, trim: bool, bucket: int = 1) -> list[TrainBatch]:
        settings: dict[str, Any] = {"share": slice(None), "num_workers": 0, "device": self._device}
        loader = TrainLoader(self._sampler, self._pixels, self._tokens, trim=trim, bucket=bucket, **settings)
        return list(islice(loader.epoch(0), self._number))


def make_tokenizer(built: BuiltModel) -> Any:
    """The model's tokenizer, or, if it cannot be fetched, CLIP's: the ids do not matter, only their number does."""
    try:
        return build_tokenizer(ModelOptions(), built)
    except UserError as error:
        print(f"({error}: CLIP's tokenizer replaces it)", file=sys.stderr)
        return SimpleTokenizer(context_length=built.clip.context_length)


class RandomPixels:
    """uint8 noise for any image (see data.pixels.Pixels)."""

    in_memory = True

    def __len__(self) -> int:
        return len(self._noise)

    def __call__(self, index: int, seed: int = 0) -> Tensor:
        return self._noise[index % len(self._noise)]

    def __init__(self, size: int | Sequence[int], number: int = 256):
        height, width = (size, size) if isinstance(size, int) else size
        self._noise = torch.randint(256, (number, 3, height, width), dtype=torch.uint8)

    def batch(self, indices: Sequence[int] | np.ndarray, seeds: Sequence[int] | np.ndarray) -> Tensor:
        return self._noise[torch.as_tensor(indices) % len(self._noise)]


def make_row(name: str, built: BuiltModel, data: Data, precision: str, device: torch.device) -> Row:
    precision = "bf16" if name in ON_AMX else precision
    make = open_clip_step if name.startswith("open_clip") else our_step
    # Warm up with every batch, twice if graphs are captured: later steps neither compile nor search for algorithms.
    warm_up = len(data.trimmed) * (2 if name in ("graph", "compile") else 1)
    return Row(lambda: make(name, built, data, precision, device), warm_up, device)


def our_step(name: str, built: BuiltModel, data: Data, precision: str, device: torch.device) -> Callable[[int], object]:
    """The step of a run with default options, except for the change that `name` names."""
    batches = {"no_trim": data.full, "graph": data.bucketed, "compile": data.bucketed}.get(name, data.trimmed)
    if name in ("no_packing", "no_trim"):
        batches = [replace(batch, lengths=None) for batch in batches]
    options = Options()
    options.train.compile = name == "compile"
    options.train.grad_cache = max(1, len(batches[0].images) // 4) if name == "grad_cache" else None
    model = RetrievalModel(copy.deepcopy(built.clip), built.preprocess).to(device)
    trainer = make_trainer(options.train, options.loss, model, precision, device, SINGLE_PROCESS)
    if name == "graph":
        trainer.replay_graphs()
    if name == "varlen":
        trainer.towers._functions = replace(BLOCK_FUNCTIONS, packed_block=varlen_block)
    if name == "all_tokens":
        pool_all_tokens(trainer.towers)
        batches = [replace(batch, lengths=None) for batch in batches]
    if name == "no_fused":
        train = options.train
        groups = parameter_groups(model, train.weight_decay)
        betas = (train.beta1, BETA2["adamw"])
        trainer.optimizer = torch.optim.AdamW(groups, train.lr, betas, train.eps, foreach=False, fused=False)
    if name == "no_channels_last":
        visual = trainer.towers.clip.visual.to(memory_format=torch.contiguous_format)
        visual.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    model.train()
    return lambda number: trainer.step(batches[number % len(batches)], number + 1, LEARNING_RATE)


def pool_all_tokens(model: RetrievalModel) -> None:
    """Compute all tokens in the last block of the image tower, as open_clip does."""
    model._functions = replace(BLOCK_FUNCTIONS, class_token=lambda block, x: block(x)[:, 0])


def varlen_block(block: ResidualAttentionBlock, x: Tensor, pack: Packing) -> Tensor:
    """Compute a block for packed captions without padding them for the attention, as `BLOCK_FUNCTIONS` does."""
    attention, (captions, _, _, longest) = block.attn, pack.mask.shape
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    ends = torch.searchsorted(pack.index, longest * torch.arange(captions + 1, device=x.device)).int()
    attended = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))
    assert isinstance(attended, Tensor)
    x = x + block.ls_1(attention.out_proj(attended.flatten(1)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def open_clip_step(
    name: str, built: BuiltModel, data: Data, precision: str, device: torch.device
) -> Callable[[int], object]:
    """The step of open_clip's training loop, with its model, loss and optimizer."""
    # model, loss and optimizer
    clip = copy.deepcopy(built.clip).to(device).train()
    loss, options = ClipLoss(cache_labels=True), Options().train
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in clip.named_parameters():
        exempt = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        (plain if exempt else decayed).append(parameter)
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": options.weight_decay}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (options.beta1, BETA2["adamw"]), options.eps)
    scaler = make_scaler(precision, device)

    def step(number: int) -> None:
        images, texts = data.normalised[number % len(data.normalised)]
        with open_clip_backends():
            # forward
            optimizer.zero_grad()
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                total = loss(*clip(images, texts))
            # backward and update
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, math.log(100))

    return step


@contextmanager
def open_clip_backends() -> Iterator[None]:
    """Enable TF32 and cuDNN's algorithm search, as open_clip's training does."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.benchmark
    matmul.fp32_precision, cudnn.benchmark = "tf32", True
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.benchmark = before


def needed_flops(built: BuiltModel, data: Data) -> tuple[float, float]:
    """FLOPs of a step of open_clip and of one of ours: forward and backward, mean over the batches."""
    # On the meta device nothing is computed. Training mode, because evaluation may use a fused path without a count.
    model = RetrievalModel(copy.deepcopy(built.clip), built.preprocess).to("meta").train()

    def count(batch: TrainBatch, pack: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch.images.to("meta"), batch.texts.to("meta"), batch.lengths if pack else None)
        return 3 * counter.get_total_flops()

    ours = mean(count(batch, True) for batch in data.trimmed)
    pool_all_tokens(model)
    return mean(count(batch, False) for batch in data.full), ours


def print_rows(
    first_cells: str, rows: dict[str, Row], pairs: int, flops: tuple[float, float] | None, peak: float | None
) -> None:
    """Print the rows; `flops` are open_clip's and ours, `peak` is that of the device in TFLOPs per second."""
    theirs = rows.get("open_clip")
    for name, row in rows.items():
        cells = ["out of memory", "", "", ""]
        if not row.out_of_memory:
            rate = pairs / median(row.seconds)
            cells = [f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}", "", "", f"{row.peak:.1f}" if row.peak else ""]
            if theirs and not theirs.out_of_memory:
                cells[1] = f"{median(a / b for a, b in zip(theirs.seconds, row.seconds)):.2f}"
            if flops and peak:
                needed = flops[0] if name.startswith("open_clip") else flops[1]
                cells[2] = f"{100 * needed / median(row.seconds) / (peak * 1e12):.1f}"
        print(f"| {first_cells} | {ROWS[name]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
