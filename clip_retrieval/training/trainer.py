"""The trainer: loss, optimizer and training step. A step does not wait for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.data.batches.sampler import BatchSampler
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.device import DTYPES, make_scaler
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import RunError
from clip_retrieval.losses import LOSSES, make_loss
from clip_retrieval.models.batch_norm import freeze_statistics
from clip_retrieval.models.towers import RetrievalModel, can_compile
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.average import EMA, make_averages
from clip_retrieval.training.cuda_graphs import GraphedTowers, Recorder, can_replay
from clip_retrieval.training.distillation import Distillation
from clip_retrieval.training.image_warmup import ImageWarmup
from clip_retrieval.training.master_weights import MasterWeights
from clip_retrieval.training.optimizer import make_optimizer

ACCURACY_ROWS = 1024  # images compared with all captions at a time
UPDATE_SHARE = 1.05  # seconds of a step, in those of its gradients


@dataclass
class StepResult:
    """The loss and the features of a step, on the device.

    Attributes:
        loss: the loss of the global batch, a scalar.
        image_features: (n, dim), of this process.
        text_features: (m, dim), of the global batch: captions, then negative captions.
        positives: int64 (P, 2), rows of image_features and text_features that belong together.
    """

    loss: Tensor
    image_features: Tensor
    text_features: Tensor
    positives: Tensor

    def accuracy(self, processes: Processes = SINGLE_PROCESS) -> tuple[float, float]:
        """Compute the in-batch accuracy of the global batch: image-to-text and text-to-image, in percent."""
        # count hits, tile by tile; the captions come first, then negative ones, which are no queries
        captions = torch.arange(len(self.text_features), device=self.text_features.device)
        positives = self.positives[:, 0] * len(captions) + self.positives[:, 1]
        hits_i2t = torch.zeros((), dtype=torch.int64, device=captions.device)
        best = self.text_features.new_full((len(captions),), -torch.inf)
        hit_t2i = torch.zeros_like(best)
        for rows in torch.arange(len(self.image_features), device=captions.device).split(ACCURACY_ROWS):
            cosine = self.image_features[rows] @ self.text_features.T
            hits_i2t += torch.isin(rows * len(captions) + cosine.argmax(1), positives).sum()
            highest, row = cosine.max(0)
            hit = torch.isin(rows[row] * len(captions) + captions, positives)
            hit_t2i = torch.where(highest > best, hit, hit_t2i)
            best = torch.maximum(highest, best)
        # reduce over the processes: the nearest image of a caption has the highest cosine of all
        nearest = processes.all_gather(best[None]).argmax(0, keepdim=True)
        queries = len(self.image_features) * processes.world_size
        t2i = processes.all_gather(hit_t2i[None]).gather(0, nearest)[:, :queries].mean()
        i2t = processes.sum(hits_i2t) / queries
        return 100 * i2t.item(), 100 * t2i.item()


class Trainer:
    """The model with its loss and optimizer.

    A batch is computed at once or in chunks (`grad_cache`; Gao et al. 2021, arXiv:2101.06983). In chunks, the towers
    first run without a graph, the loss of the whole batch gives the gradient of each feature, and each chunk runs again
    for the gradients of its parameters. The gradients are those of the whole batch; the memory is that of a chunk.

    Args:
        model: the model, on its device, float32, with its trainable parameters set. Its copy in `precision` computes
            features and gradients; the optimizer updates the model itself.
        loss: options of the loss.
        options: options of the optimizer and of the chunks.
        precision: "fp32", "bf16" or "fp16".
        device: the device of the model.
        processes: the process group that shares a batch.
    """

    def __init__(
        self,
        model: RetrievalModel,
        loss: LossOptions,
        options: TrainOptions,
        *,
        precision: str,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
    ):
        self.model = model
        self.loss_options = loss
        self.loss = make_loss(loss, processes)
        self.precision = precision
        self.device = device
        self.processes = processes
        self.grad_cache = options.grad_cache
        self.accum_freq = options.accum_freq
        self.grad_clip = options.grad_clip
        self.seed = options.seed
        self._recomputes = options.grad_checkpointing
        self.optimizer_name = options.optimizer
        self.optimizer = make_optimizer(model, options, device)
        self.scaler = make_scaler(precision, device)
        self.averages = make_averages(model, options)
        # the model that computes: a copy in lower precision, or the model itself
        self.towers = model if precision == "fp32" else model.copy_in(DTYPES[precision])
        self._mode: bool | None = None  # of the copy
        self._masters = None if precision == "fp32" else MasterWeights(model, self.towers)
        self._graphs: GraphedTowers | None = None
        if options.compile:
            if can_compile(device):
                self.towers.compile_towers()
            self.replay_graphs()
        self._parallel: DistributedDataParallel | None = None
        if processes.world_size > 1:
            # averages the gradients over the processes during the backward pass
            self._parallel = DistributedDataParallel(self.towers, gradient_as_bucket_view=True)
            if self._masters is not None:
                self._masters.average_over_processes(self._parallel)
        self.distillation: Distillation | None = None
        self.image_warmup: ImageWarmup | None = None
        self._first_bad_step = torch.tensor(-1, device=device)

    def replay_graphs(self) -> None:
        """Replay the towers as CUDA graphs from now on, if this run can: in one process, on a GPU."""
        alone = self.device.type == "cuda" and self.processes.world_size == 1
        if alone and not self._recomputes and can_replay(self.model):
            self._graphs = GraphedTowers(self.towers, self.model, Recorder(self.device))

    @property
    def trainable_shapes(self) -> dict[str, list[int]]:
        """The shapes of the trainable parameters by name, in order."""
        return {name: list(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}

    def load_optimizer(self, optimizer: dict, scaler: dict) -> None:
        """Load moments, loss scale and last learning rate. The hyperparameters stay those of this run's options.

        `training.state` has checked that the moments fit the parameters. They are copied to tensors with the memory
        format of the parameters, because the kernels rely on it.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {
            number: {
                name: moment.clone() if name == "step" else torch.empty_like(parameters[number]).copy_(moment)
                for name, moment in moments.items()
            }
            for number, moments in optimizer["state"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        for group, stored in zip(groups, optimizer["param_groups"], strict=True):
            group["lr"] = stored["lr"]  # of the last step, as in an uninterrupted run
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)

    def step(self, batch: TrainBatch, step: int, learning_rate: float) -> StepResult:
        """Compute the loss of `batch` and update the weights. `step` counts from 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        result = self._compute_gradients(batch, step)
        self._update()
        if EMA in self.averages:
            self.averages[EMA].update()
        self._record_bad_step(result.loss, step)
        return result

    def time_step(self, batch: TrainBatch, step: int = 1, repeats: int = 5) -> float:
        """Return the seconds of a step on `batch`, at best, without changing the model."""
        seconds = []
        with freeze_statistics(self.towers):
            for _ in range(repeats):
                started = time.perf_counter()
                self._compute_gradients(batch, step)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds.append(time.perf_counter() - started)
        self.optimizer.zero_grad(set_to_none=True)
        return UPDATE_SHARE * min(seconds)

    def _compute_gradients(self, batch: TrainBatch, step: int) -> StepResult:
        if self.towers is not self.model and self._mode != self.model.training:  # setting it takes milliseconds
            self._mode = self.model.training
            self.towers.train(self._mode)
        if self._masters is not None:
            self._masters.cast()

        # forward; a teacher sees the images at their full size
        full = batch
        if self.image_warmup is not None:
            batch = self.image_warmup.reduce(batch, step)
        chunks = self._split_rows(len(batch.images))
        whole = len(chunks) == 1
        features = self._encode(batch, step, 0, chunks[0]) if whole else self._encode_without_graph(batch, step, chunks)

        # loss: detach its inputs (features, logit scale and bias), to collect the gradient of each
        leaves = [tensor.detach().requires_grad_() for tensor in (*features, *self._scale_and_bias())]
        text_features = batch.select_texts(self.processes.all_gather(leaves[1]))
        loss = self.loss(leaves[0], text_features, batch.positives, *leaves[2:])
        if self.distillation is not None:
            loss = loss + self.distillation(full, chunks, leaves[:3], text_features)
        # times world_size: gradients are averaged over the processes, but the loss is the sum of their parts
        self.scaler.scale(loss * self.processes.world_size).backward()

        # backward through the towers
        gradients = [leaf.grad for leaf in leaves]
        if whole:
            self._backward([*features, *self._scale_and_bias()], gradients)
        else:
            self._backward_in_chunks(batch, step, chunks, gradients)
        loss = self.processes.sum(loss.detach())
        return StepResult(loss, leaves[0].detach(), text_features.detach(), batch.positives)

    @torch.no_grad()
    def validate(
        self, image_features: Tensor, text_features: Tensor, dataset: RetrievalDataset, batch_size: int
    ) -> dict[str, float]:
        """Compute the mean loss and in-batch accuracy (percent) of a split, in batches like those of training.

        Args:
            image_features: (images, dim), of the whole split, also with several processes.
            text_features: (captions, dim), of the whole split.
            dataset: the split. The order of its pairs is the same each time.
            batch_size: pairs in a batch, at most all pairs of the split.
        """
        batch_size = min(batch_size, len(dataset.pairs))
        loss = make_loss(self.loss_options, SINGLE_PROCESS)
        results = []
        for batch in BatchSampler(dataset, batch_size).epoch(0):
            images, texts = (
                image_features[torch.from_numpy(batch.images)],
                text_features[torch.from_numpy(batch.captions)],
            )
            positives = torch.from_numpy(dataset.positives(batch.images, batch.captions)).to(self.device)
            result = StepResult(loss(images, texts, positives, *self._scale_and_bias()), images, texts, positives)
            results.append((result.loss.item(), *result.accuracy()))
        means = np.mean(results, axis=0).tolist()
        return dict(zip(("loss", "i2t_accuracy", "t2i_accuracy"), means)) | {"batch_size": batch_size}

    def _split_rows(self, pairs: int) -> list[slice]:
        size = self.grad_cache or -(-pairs // self.accum_freq)
        return [slice(start, min(start + size, pairs)) for start in range(0, pairs, size)]

    def _encode(self, batch: TrainBatch, step: int, chunk: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Compute the features of a chunk. A second pass and a resumed run draw the same dropout masks."""
        torch.manual_seed(_mix_seed(self.seed, step, self.processes.rank, chunk))
        if self._graphs is not None:
            return self._graphs(*batch.part(rows))
        towers = self._parallel if self._parallel is not None and torch.is_grad_enabled() else self.towers
        return towers(*batch.part(rows))

    def _encode_without_graph(self, batch: TrainBatch, step: int, chunks: Sequence[slice]) -> list[Tensor]:
        with torch.no_grad(), freeze_statistics(self.towers):
            parts = [self._encode(batch, step, number, rows) for number, rows in enumerate(chunks)]
        return [torch.cat(features) for features in zip(*parts, strict=True)]

    def _scale_and_bias(self) -> list[Tensor]:
        clip = self.model.clip
        return [clip.logit_scale.exp()] + ([] if clip.logit_bias is None else [clip.logit_bias])

    def _backward(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], *, last: bool = True) -> None:
        """Backpropagate the gradients of a chunk. Unused scales and frozen towers, which have no graph, are skipped."""
        used = [(t, g) for t, g in zip(tensors, gradients, strict=True) if t.requires_grad and g is not None]
        if used:
            # blocks that run again would update their batch statistics again
            with freeze_statistics(self.towers) if self._recomputes else nullcontext():
                torch.autograd.backward([t for t, _ in used], [g for _, g in used])
        if self._masters is not None:
            if last and self._parallel is not None:  # collected and averaged during the backward pass
                self._masters.free_gradients()
            else:
                self._masters.collect_gradients()

    def _backward_in_chunks(
        self, batch: TrainBatch, step: int, chunks: Sequence[slice], gradients: Sequence[Tensor | None]
    ) -> None:
        images, texts, *scale_and_bias = gradients
        for number, rows in enumerate(chunks):
            last = number == len(chunks) - 1
            # The processes exchange their gradients once, with the last chunk.
            with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
                tensors = list(self._encode(batch, step, number, rows))
                parts = [None if images is None else images[rows]]
                parts += [None if texts is None else texts[batch.of_texts(rows)]]
                if last:
                    tensors += self._scale_and_bias()
                    parts += scale_and_bias
                self._backward(tensors, parts, last=last)
                del tensors  # the autograd graph of one chunk must not be alive when the next one is captured

    def _update(self) -> None:
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trainable, self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        highest, logit_scale = LOSSES[self.loss_options.loss].highest_scale, self.model.clip.logit_scale
        if highest is not None and logit_scale.requires_grad:
            logit_scale.data.clamp_(0, math.log(highest))

    def _record_bad_step(self, loss: Tensor, step: int) -> None:
        """Record, on the device, the first step whose loss is not finite; reading it at each step would stall."""
        bad = ~torch.isfinite(loss) & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(bad, step, self._first_bad_step)

    def check_finite(self) -> None:
        """Raise RunError if the loss of any step so far was not finite. Synchronizes with the device."""
        step = int(self._first_bad_step)
        if step >= 0:
            raise _not_finite_error(f"the loss is not finite at step {step}")

    def check_weights_finite(self) -> None:
        """Raise RunError if a trainable weight is not finite, which the loss does not show after the last step."""
        norms = torch._foreach_norm([p.detach() for group in self.optimizer.param_groups for p in group["params"]])
        if not torch.stack(norms).isfinite().all():
            raise _not_finite_error("the weights are not finite")


def _mix_seed(*numbers: int) -> int:
    """Hash several numbers to a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _not_finite_error(problem: str) -> RunError:
    return RunError(
        f"{problem}; an earlier checkpoint, if any, is kept. Resume from it with --resume auto and a lower --lr, "
        "--grad_clip 1, or --precision fp32"
    )
