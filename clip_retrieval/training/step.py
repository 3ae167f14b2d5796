"""One optimizer step, without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from clip_retrieval.data.loader import TrainBatch
from clip_retrieval.errors import RunError
from clip_retrieval.losses import Loss
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import TrainOptions
from clip_retrieval.training.optimizer import make_optimizer
from clip_retrieval.training.precision import autocast, make_scaler

MAX_LOGIT_SCALE = math.log(100)


@dataclass
class StepResult:
    """What a step leaves for the log, still on the device: the mean loss, and the features of its last part."""

    loss: torch.Tensor
    image_features: torch.Tensor
    text_features: torch.Tensor
    positives: torch.Tensor

    def accuracy(self) -> tuple[float, float]:
        """In-batch accuracy, image-to-text and text-to-image, in percent. Waits for the device."""
        cosine = self.image_features @ self.text_features.T
        i2t = self.positives.gather(1, cosine.argmax(dim=1, keepdim=True)).float().mean()
        t2i = self.positives.T.gather(1, cosine.T.argmax(dim=1, keepdim=True)).float().mean()
        return 100 * i2t.item(), 100 * t2i.item()


class Trainer:
    """The model with everything that a step changes.

    Args:
        model: on its device, with the parameters that learn already chosen.
        loss: a function of features and positives.
        clamp_scale: hold the logit scale within [0, ln 100] (InfoNCE).
        precision: "fp32", "bf16" or "fp16".
    """

    def __init__(
        self,
        model: RetrievalModel,
        loss: Loss,
        options: TrainOptions,
        *,
        clamp_scale: bool,
        precision: str,
        device: torch.device,
    ):
        self.model = model
        self.loss = loss
        self.clamp_scale = clamp_scale
        self.precision = precision
        self.device = device
        self.accum_freq = options.accum_freq
        self.grad_clip = options.grad_clip
        self.optimizer = make_optimizer(model, options, device)
        self.scaler = make_scaler(precision, device)
        self._first_bad_step = torch.tensor(-1, device=device)

    @property
    def learning(self) -> dict[str, list[int]]:
        """The parameters that learn, in order, with their sizes."""
        return {name: list(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}

    def load_optimizer(self, optimizer: dict, scaler: dict) -> None:
        """Take over moments and loss scale; the hyperparameters stay those of this run's options."""
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(optimizer)
        for group, settings in zip(self.optimizer.param_groups, own):
            group.update(settings)
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)

    def step(self, batch: TrainBatch, step: int, learning_rate: float) -> StepResult:
        """Compute the loss of `batch` (on the CPU) and update the weights. `step` counts from 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        batch = batch.to(self.device)
        parts = torch.arange(len(batch.images)).chunk(self.accum_freq)
        losses = []
        for rows in parts:
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            with autocast(self.precision, self.device):
                image_features, text_features = self.model(batch.images[part], batch.tokens[part])
            clip = self.model.clip
            positives = batch.positives[part, part]
            # Outside autocast: the logits are float32, whatever the towers compute in.
            loss = self.loss(image_features, text_features, positives, clip.logit_scale.exp(), clip.logit_bias)
            self.scaler.scale(loss / len(parts)).backward()
            losses.append(loss.detach())
        self._update()
        mean_loss = torch.stack(losses).mean()
        self._note_bad_step(mean_loss, step)
        return StepResult(mean_loss, image_features.detach(), text_features.detach(), positives)

    def _update(self) -> None:
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            learning = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(learning, self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.clamp_scale:
            self.model.clip.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)

    def _note_bad_step(self, loss: torch.Tensor, step: int) -> None:
        """Remember, on the device, the first step whose loss is not finite: asking at each step would stall it."""
        bad = ~torch.isfinite(loss) & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(bad, step, self._first_bad_step)

    def check_finite(self) -> None:
        """Raise RunError if the loss of any step so far was not finite. Waits for the device."""
        step = int(self._first_bad_step)
        if step >= 0:
            raise _not_finite(f"the loss is not finite at step {step}")

    def check_weights_finite(self) -> None:
        """Raise RunError if a weight that learns is not finite: the last step may have had a finite loss."""
        norms = torch._foreach_norm([p.detach() for group in self.optimizer.param_groups for p in group["params"]])
        if not torch.stack(norms).isfinite().all():
            raise _not_finite("the weights are not finite")


def _not_finite(what: str) -> RunError:
    return RunError(
        f"{what}; a checkpoint from before is kept where there was one. Go on from it with --resume auto and a lower "
        "--lr, --grad_clip 1, or --precision fp32"
    )
