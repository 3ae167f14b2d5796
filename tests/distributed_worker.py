"""The work of the processes that tests/test_distributed.py starts; the test compares it with that of one process.

torchrun --nproc_per_node 2 -m tests.distributed_worker FOLDER COMMANDS.json    # each writes FOLDER/<rank>.pt
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clip_retrieval.data.batches.loader import TrainBatch, TrainLoader
from clip_retrieval.data.batches.sampler import BatchSampler, process_slice
from clip_retrieval.data.batches.skipped import SkipCounter
from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.data.pixels.pixels import ImageTransform, make_pixels
from clip_retrieval.data.shards.lanes import LaneReader
from clip_retrieval.data.shards.order import ShardOrder, Shards
from clip_retrieval.data.shards.stream import StreamLoader
from clip_retrieval.distributed import Processes, process_group
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.losses import LOSSES, make_loss, pairs
from clip_retrieval.models.batch_norm import share_statistics
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import LossOptions
from clip_retrieval.run.merge import settle
from clip_retrieval.run.train_parts import make_trainer
from clip_retrieval.training.distillation import Distillation
from clip_retrieval.training.trainer import Trainer
from tests.conftest import Killed
from tests.data.make_shards import jpeg, write_shard
from tests.models.small import TEXT, small_clip, small_preprocess, small_simple_clip

MAIN = Path(__file__).parent.parent / "main.py"
CPU = torch.device("cpu")

# The image of each pair of the global batch; some images occur in both halves.
IMAGES = torch.tensor([0, 1, 2, 3, 0, 4, 5, 0, 1, 6, 2, 7])
VOCABULARY = 1000
CHUNK = 4  # each of two processes has 6 pairs, so its last chunk is smaller


def cases() -> dict[str, dict[str, Any]]:
    """Options of small trainers."""
    found = {}
    for loss, model, grad_cache in itertools.product(
        ("infonce", "siglip", "margin", "triplet"), ("vit", "resnet"), (None, CHUNK)
    ):
        name = f"{loss} {model}" + (" grad_cache" if grad_cache else "")
        found[name] = {"loss": loss, "resnet": model == "resnet", "grad_cache": grad_cache}
    found["infonce simple-clip"] = {"simple_clip": True}
    found["siglip simple-clip grad_cache"] = {"loss": "siglip", "simple_clip": True, "grad_cache": CHUNK}
    found["simple-clip grad_checkpointing"] = {"simple_clip": True, "grad_checkpointing": True}
    found["resnet grad_checkpointing"] = {"resnet": True, "grad_checkpointing": True}
    found["margin linear_projection"] = {"loss": "margin", "trainable": "linear_projection"}
    found["margin adaptor grad_cache"] = {"loss": "margin", "trainable": "adaptor", "grad_cache": CHUNK}
    found["infonce freeze_vision"] = {"freeze_vision": True, "resnet": True}
    found["lora grad_cache"] = {"trainable": "lora", "lora_targets": "all", "grad_cache": CHUNK}
    found["lora simple-clip"] = {"trainable": "lora", "simple_clip": True, "freeze_vision": True}
    found["lora bf16 grad_cache"] = {"trainable": "lora", "precision": "bf16", "grad_cache": 2}
    found["bitfit resnet"] = {"trainable": "bitfit", "resnet": True}
    found["unlocked blocks, own rates"] = {
        "resnet": True,
        "unlocked_image_blocks": 1,
        "unlocked_text_blocks": 1,
        "lr_text": 1e-6,
        "layer_decay": 0.5,
    }
    found["muon grad_cache"] = {"optimizer": "muon", "eps": 1.0, "layer_decay": 0.5, "grad_cache": CHUNK}
    found["muon lora"] = {"optimizer": "muon", "eps": 1.0, "trainable": "lora"}
    found["label_smoothing"] = {"label_smoothing": 0.1, "i2t_weight": 0.3, "temperature": 0.05}
    found["distill feature"] = {"distill_from": "start", "distill_kind": "feature"}
    found["distill relational grad_cache"] = {"distill_from": "start", "grad_cache": CHUNK}
    found["bf16"] = {"precision": "bf16"}
    found["bf16 grad_cache"] = {"precision": "bf16", "grad_cache": 2}
    return found


def rows_by_process(grad_cache: int | None, world_size: int = 2) -> Tensor:
    """The rows of the global batch in the order in which `world_size` processes compute them."""
    shares = torch.arange(len(IMAGES)).chunk(world_size)
    chunks = zip(*(share.split(grad_cache or len(IMAGES)) for share in shares))
    return torch.cat([part for chunk in chunks for part in chunk])


def global_batch(size: int) -> TrainBatch:
    """A batch with duplicate images and captions."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(IMAGES), 3, size, size), dtype=torch.uint8, generator=generator)[IMAGES]
    texts = torch.randint(1, VOCABULARY, (len(IMAGES), 7), generator=generator)
    texts[7] = texts[0]
    positives = IMAGES[:, None] == IMAGES
    positives[3, 9] = True  # a caption of two images
    return TrainBatch(images, texts, positives.nonzero())


def part_of(batch: TrainBatch, image_rows: Tensor, caption_rows: Tensor, own_captions: Tensor) -> TrainBatch:
    """The rows `image_rows` of a batch, with positives for the captions in the order `caption_rows`."""
    matrix = torch.zeros(len(IMAGES), len(IMAGES), dtype=torch.bool)
    matrix[tuple(batch.positives.T)] = True
    return TrainBatch(
        batch.images[image_rows], batch.texts[own_captions], matrix[image_rows][:, caption_rows].nonzero()
    )


@torch.no_grad()
def clone_all(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}


def train_small(
    processes: Processes,
    *,
    resnet: bool = False,
    simple_clip: bool = False,
    grad_cache: int | None = None,
    precision: str = "fp32",
    **options: Any,
) -> list[dict[str, Any]]:
    """Train two steps in float64, or in bf16; return loss, accuracy, gradients and the weights after each.

    A single process computes the chunks of two processes together, because batch statistics are those of a chunk. In
    bf16 it computes the chunks of each process: the gradients of a chunk are rounded.
    """
    # this process's part of the batch
    rows = torch.arange(len(IMAGES))
    if processes.world_size > 1:
        own = rows[process_slice(len(rows), processes.rank, processes.world_size)]
    elif precision == "bf16":
        own, grad_cache = rows, grad_cache or len(rows) // 2
    else:
        own = rows = rows_by_process(grad_cache)
        grad_cache = grad_cache and 2 * grad_cache
    batch = part_of(global_batch(32 if resnet or simple_clip else 16), own, rows, own)

    # The trainer. A large epsilon keeps AdamW from amplifying rounding errors of small gradients.
    defaults = {"optimizer": "adamw", "eps": 1.0, "weight_decay": 0.1}
    all_options = settle(defaults, options, {"grad_cache": grad_cache})
    bias = -10.0 if all_options.loss.loss == "siglip" else None
    if simple_clip:
        clip = small_simple_clip(vocabulary=VOCABULARY, bias=bias)
    else:
        clip = small_clip(resnet, text_cfg=TEXT | {"vocab_size": VOCABULARY}, init_logit_bias=bias)
    torch.manual_seed(0)
    model = RetrievalModel(clip, small_preprocess(), adaptor=all_options.train.trainable == "adaptor")

    # the steps
    patched = mock.patch.object(Tensor, "float", Tensor.double)  # for the features of the towers
    with patched if precision == "fp32" else contextlib.nullcontext():
        model = model.double() if precision == "fp32" else model
        trainer = make_trainer(all_options.train, all_options.loss, model, precision, CPU, processes)
        if all_options.loss.distill_from:  # from another model: the first step has a loss too
            clip = small_clip(text_cfg=TEXT | {"vocab_size": VOCABULARY}, seed=1)
            teacher = RetrievalModel(clip, small_preprocess()).double()
            trainer.distillation = Distillation(teacher, all_options.loss.distill_kind, 2.0, processes)
        model.train()
        steps, update = [], trainer._update

        def keep_gradients_and_update():
            steps.append({"gradients": clone_all({name: p.grad for name, p in model.named_parameters()})})
            update()

        trainer._update = keep_gradients_and_update
        for step in (1, 2):
            result = trainer.step(batch, step, 0.5)
            steps[-1] |= {
                "loss": result.loss,
                "accuracy": result.accuracy(processes),
                "after": clone_all(model.weights()),
            }
    return steps


def normalise_bfloat16(processes: Processes) -> dict[str, Tensor]:
    """Batch normalisation of values far from 0: of this process's half of them, or of all."""
    values = (torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    layer = nn.Sequential(nn.BatchNorm1d(4))
    if processes.world_size > 1:
        values = values.chunk(processes.world_size)[processes.rank]
        layer = share_statistics(layer, CPU)
    return {"values": layer(values).detach(), "mean": layer[0].running_mean, "var": layer[0].running_var}


def warnings_about_skipped_samples(processes: Processes) -> list[str]:
    """The warnings of this process after an epoch in which the last process skipped a sample."""
    skipped = SkipCounter("samples", processes)
    skipped.count(["0.tar, sample é"] if processes.rank == processes.world_size - 1 else [])
    with mock.patch("clip_retrieval.data.batches.skipped.log.warning") as warning:
        skipped.log_all()
    return [call.args[0] for call in warning.call_args_list]


def gather_uneven_rows(processes: Processes) -> dict[str, Tensor]:
    """The gathered rows, if process r has `lengths[r]` rows."""
    gathered = {}
    for name, lengths in {"uneven": (3, 1), "empty": (0, 2), "last is empty": (4, 0), "none": (0, 0)}.items():
        own = torch.arange(2.0 * lengths[processes.rank]).view(-1, 2) + 100 * processes.rank
        gathered[name] = processes.all_gather_rows(own)
    return gathered


def gather_as_if_on_one_gpu(processes: Processes) -> list[list[Tensor]]:
    """The gathered rows and their gradient, directly and through the CPU."""
    found = []
    for shares_gpus in (False, True):
        own = (torch.arange(6.0).view(3, 2) + 10 * processes.rank).requires_grad_()
        gathered = replace(processes, shares_gpus=shares_gpus).all_gather(own)
        (gathered * torch.arange(12.0 * (1 + processes.rank))[-12:].view(6, 2)).sum().backward()
        found.append([gathered.detach(), own.grad])
    return found


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is created."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def largest_tensor(processes: Processes, share: int = 1000, tile: int = 300) -> dict[str, int]:
    """The number of elements of the largest tensor of each loss, for `share` pairs in each process."""
    found = {}
    for name in LOSSES:
        image, text = (F.normalize(torch.randn(share, 8), dim=-1).requires_grad_() for _ in range(2))
        positives = torch.arange(share)[:, None] + torch.tensor([0, share * processes.rank])
        loss = make_loss(LossOptions(loss=name), processes)
        with mock.patch.object(pairs, "TILE", tile), Largest() as largest:
            texts = processes.all_gather(text)
            loss(image, texts, positives, torch.tensor(10.0), torch.tensor(-10.0)).backward()
        found[name] = largest.numel
    return found


def ranks_of_many_tiles(processes: Processes) -> list[list[int]]:
    """The counts of retrieval_ranks for features with many ties, in tiles of 5 x 4."""
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (37, 91))
    relevant = torch.stack([torch.arange(91) % 37, torch.arange(91)], dim=1)
    ranks = retrieval_ranks(image, text, relevant, tile=(5, 4), processes=processes)
    return [counts.tolist() for direction in ranks for counts in vars(direction).values()]


class PartlyBrokenImages(ImageArray):
    """Images, two of them unreadable."""

    def __getitem__(self, index: int) -> Image.Image:
        if index in (3, 7):
            raise UserError(f"image {index} is broken")
        return super().__getitem__(index)


def batches_with_replaced_images(processes: Processes) -> list[TrainBatch]:
    """The batches of two epochs in which other pairs replace unreadable images."""
    images = PartlyBrokenImages(
        np.random.default_rng(0).integers(0, 256, (12, 20, 26, 3), dtype=np.uint8), "some broken"
    )
    pairs = np.array([(i // 2, i) for i in range(24)])
    dataset = RetrievalDataset("some broken", "train", images, [str(i) for i in range(24)], pairs)
    loader = TrainLoader(
        BatchSampler(dataset, 8, seed=3),
        make_pixels(images, small_preprocess(), augment="crop"),
        Tokens(torch.arange(24)[:, None].int(), torch.ones(24, dtype=torch.int64), 0),
        trim=True,
        share=process_slice(8, processes.rank, processes.world_size),
        num_workers=0,
        device=CPU,
        processes=processes,
        skip_unreadable=True,
    )
    return [batch for epoch in range(2) for batch in loader.epoch(epoch)]


def batches_with_duplicate_images(processes: Processes, folder: Path) -> list[TrainBatch]:
    """The batches of an epoch of 16 captions of four images; each image is four times in the shard."""
    samples = [(f"{i:05}", {"jpg": jpeg(i // 4), "txt": f"thing {i}"}) for i in range(16)]
    path = write_shard(folder / f"duplicates-{processes.world_size}-{processes.rank}.tar", samples)
    reader = LaneReader(ShardOrder(Shards([path]), 8, seed=3), ImageTransform(small_preprocess()))
    tokenizer = SimpleTokenizer(context_length=16)
    loader = StreamLoader(reader, tokenizer, trim=False, num_workers=0, device=CPU, processes=processes)
    return list(loader.epoch(0))


def run_main(*arguments: Any, killed_in_step: int | None = None) -> tuple[int | None, str, str]:
    """Run main.py; return its exit code (None if killed), standard output and standard error."""
    normal = Trainer.step

    def step(self, batch, number, rate):
        if number == killed_in_step:
            raise Killed
        return normal(self, batch, number, rate)

    def exit_normally(code: int):
        raise SystemExit(code)

    # run in this process, with patched step and exit
    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        mock.patch.object(sys, "argv", ["main.py", *map(str, arguments)]),
        mock.patch.object(Trainer, "step", step),
        mock.patch.object(os, "_exit", exit_normally),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(MAIN), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        except Killed:
            pass
    return code, out.getvalue(), err.getvalue()


def run_main_in_a_group(number: int, command: dict[str, Any]) -> tuple[int | None, str, str]:
    """Like `run_main`, in process group `number`: torchrun itself provides only one group."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(str(number), dist.TCPStore(address, port, is_master=False))
    init_process_group = functools.partial(dist.init_process_group, store=store, rank=rank, world_size=world_size)
    try:
        with mock.patch.object(dist, "init_process_group", init_process_group):
            return run_main(*command["arguments"], killed_in_step=command.get("killed_in_step"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    folder, commands = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with process_group("cpu") as processes:
        found = {
            "steps": {name: train_small(processes, **case) for name, case in cases().items()},
            "normalised": normalise_bfloat16(processes),
            "rows": gather_uneven_rows(processes),
            "through_cpu": gather_as_if_on_one_gpu(processes),
            "largest": largest_tensor(processes),
            "ranks": ranks_of_many_tiles(processes),
            "warnings": warnings_about_skipped_samples(processes),
            "replaced": [vars(batch) for batch in batches_with_replaced_images(processes)],
            "duplicates": [vars(batch) for batch in batches_with_duplicate_images(processes, folder)],
        }
    found["runs"] = {
        name: run_main_in_a_group(number, command) for number, (name, command) in enumerate(commands.items())
    }
    torch.save(found, folder / f"{processes.rank}.pt")


if __name__ == "__main__":
    main()
