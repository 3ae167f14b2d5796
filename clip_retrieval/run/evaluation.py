"""An evaluation: a split, the model or models that encode it, and their scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.device import choose_device
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.evaluator import SplitFeatures, score
from clip_retrieval.evaluation.protocols import check_protocols
from clip_retrieval.evaluation.ranks import Ranks
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.options import Options
from clip_retrieval.run.ensemble import Ensemble, load_ensemble
from clip_retrieval.run.reranking import read_bank, rerank
from clip_retrieval.run.splits import count_trained, describe_prefix, read_split


@dataclass(frozen=True)
class Scores:
    """The features of a split, the ranks (image to text, text to image), and the content of results.json."""

    encoded: SplitFeatures
    ranks: tuple[Ranks, Ranks]
    results: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A split and the models to score on it.

    Attributes:
        dataset: the split.
        trained_on: number of its images that the models were trained on.
        ensemble: the model, and those of --ensemble.
        bank: the training captions that a method of --rerank needs, or None.
        options: the options.
        processes: they share the work.
    """

    dataset: RetrievalDataset
    trained_on: int
    ensemble: Ensemble
    bank: list[str] | None
    options: Options
    processes: Processes

    @classmethod
    def prepare(cls, options: Options, checkpoint: Checkpoint | None, processes: Processes) -> Evaluation:
        """Read the split, then load the models, which may be downloads.

        Raises UserError if there is no such split, --rerank lacks training captions, or a model cannot be loaded.
        """
        # the split
        device = choose_device(options.run.device)
        dataset = read_split(options.data, options.evaluation.eval_split, device, processes)
        if dataset is None:
            raise UserError(
                f"{options.data.name} in {options.data.place} has no {options.evaluation.eval_split} split; choose "
                "another --eval_split, or other data"
            )
        evaluation = options.evaluation
        check_protocols(evaluation.protocols, dataset)
        bank = read_bank(options.data, evaluation.rerank or (), evaluation.rerank_bank, options.train.seed)

        # its images that were trained on
        others = [Checkpoint.load_if_ours(Path(path)) for path in evaluation.ensemble or ()]
        sources = [(checkpoint, options.model.pretrained), *((other, None) for other in others)]
        trained_on = max(count_trained(dataset, options.data.fractions, *source) for source in sources)
        if trained_on and dataset.split != UNSPLIT:
            dataset = replace(dataset, split="train")  # held out here, but not in training

        # the models
        ensemble = load_ensemble(options, checkpoint, device, processes)
        return cls(dataset, trained_on, ensemble, bank, options, processes)

    def score(self) -> Scores:
        """Encode the split, score it, and re-rank it with the methods of --rerank."""
        evaluation, ensemble = self.options.evaluation, self.ensemble
        encoded = ensemble.encode(self.dataset)
        block, ranks = score(encoded, self.dataset, evaluation, self.processes, full=True)
        if evaluation.rerank:
            block["rerank"] = rerank(ensemble, encoded, self.dataset, self.bank)
        built = ensemble.members[0].built
        settings = {"decoder": self.options.data.decoder} | describe_prefix(self.options.data)
        results = {"model": ensemble.name, **settings, **block, "weights": built.weights, **ensemble.describe()}
        results |= {"images_trained_on": self.trained_on} if self.trained_on else {}
        return Scores(encoded, ranks, results)
