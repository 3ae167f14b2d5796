"""Score several weights of one model on the splits of a data set, which are prepared once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from clip_retrieval.classification.task import ZeroShotTask, score_task
from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.device import choose_device
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.evaluator import encode_split, score
from clip_retrieval.log import log
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.model_config import State
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import Options
from clip_retrieval.run.model import load_model
from clip_retrieval.run.settings import settle_options
from clip_retrieval.run.splits import describe_prefix, make_split, read_split
from clip_retrieval.run.train_data import load_retention, load_zero_shot


@dataclass
class WeightScorer:
    """A model whose weights are replaced and scored, again and again.

    Attributes:
        options: the options of its checkpoint, and those that were typed.
        checkpoint: the checkpoint.
        model, built: the model, on its device, and its config.
        splits: "val", "test" if the data has it, and "retention", the split of --retention_dataset, if asked for.
        zero_shot: the classification of --zero_shot_eval, if any.
        processes: they share the work.
    """

    options: Options
    checkpoint: Checkpoint
    model: RetrievalModel
    built: BuiltModel
    splits: dict[str, Split]
    zero_shot: ZeroShotTask | None
    processes: Processes

    @classmethod
    def prepare(
        cls, options: Options, checkpoint: Checkpoint, processes: Processes, *, retention: bool = False
    ) -> WeightScorer:
        """Read the splits and load the model. Raises UserError if there is no val split."""
        device = choose_device(options.run.device)
        # the data
        datasets = {}
        for name in ("val", "test"):
            dataset = read_split(options.data, name, device, processes, require_pairs=name == "val")
            if dataset is not None and dataset.split != UNSPLIT:
                datasets[name] = dataset
        if "val" not in datasets:
            raise UserError(f"{options.data.name} in {options.data.place} has no val split to choose on; give one")
        # the model
        with processes.main_first():  # it may download
            model, built, tokenizer = load_model(options, checkpoint)
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            log.warning("the statistics of batch normalisation are averaged like weights, which may cost recall")
        splits = {
            name: make_split(options.data, dataset, tokenizer, built.preprocess, device)
            for name, dataset in datasets.items()
        }
        retained = load_retention(options, tokenizer, built.preprocess, device, processes) if retention else None
        if retained is not None:
            splits["retention"] = retained
        with processes.main_first():
            root = options.data.parts()[0].dataset_root
            zero_shot = load_zero_shot(options.evaluation, root, tokenizer, built.preprocess)
        return cls(options, checkpoint, model.to(device).eval(), built, splits, zero_shot, processes)

    def score(self, split: str) -> dict[str, Any]:
        """Score the current weights on a split: its block of results.json."""
        data, evaluation = self.splits[split], self.options.evaluation
        device = choose_device(self.options.run.device)
        encoded = encode_split(
            self.model,
            data.dataset,
            data.tokens,
            data.pixels,
            evaluation,
            num_workers=self.options.data.num_workers,
            device=device,
            processes=self.processes,
        )
        block, _ = score(encoded, data.dataset, evaluation, self.processes)
        settings = {"decoder": self.options.data.decoder} | describe_prefix(self.options.data)
        return {"model": self.built.name, **settings, **block}

    def score_all(self, state: State) -> dict[str, Any]:
        """Load weights and score them on every split; and their zero-shot accuracy if --zero_shot_eval is given."""
        self.model.load_weights(state)
        blocks = {name: self.score(name) for name in self.splits}
        if self.zero_shot is not None:
            block = score_task(
                self.model,
                self.zero_shot,
                self.options.evaluation,
                num_workers=self.options.data.num_workers,
                device=choose_device(self.options.run.device),
                processes=self.processes,
            )
            blocks["zero_shot"] = {k: v for k, v in block.items() if k not in ("per_class", "templates")}
        return blocks


def selection_score(row: dict[str, Any], retention_weight: float) -> float:
    """Return val rsum + the weight x the retention score, of the blocks of `score_all`, as `run.selection` does."""
    if not retention_weight:
        return row["val"]["rsum"]
    retained = row["retention"]["rsum"] if "retention" in row else row["zero_shot"]["top1"]
    return row["val"]["rsum"] + retention_weight * retained


def settle_checkpoint(path: Path, typed: dict[str, Any]) -> tuple[Options, Checkpoint]:
    """Return the options and the content of a checkpoint of ours; typed options take precedence.

    Raises UserError if it is something else.
    """
    options, checkpoint = settle_options({**typed, "resume": str(path), "eval": True})
    if checkpoint is None:
        raise UserError(f"{path} is not a checkpoint of this tool; give a best.pt")
    return options, checkpoint


def with_weights(checkpoint: Checkpoint, state: State, val: dict[str, Any] | None) -> Checkpoint:
    """Return a checkpoint for evaluation with other weights, and their block of the val split."""
    names = ("model_config", "preprocess", "options", "epoch", "step")
    kept = {name: getattr(checkpoint, name) for name in names}
    return replace(Checkpoint(model=state, **kept), val=val)
