"""The models of an evaluation: one, or with --ensemble several, whose features are combined."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.evaluator import SplitFeatures, encode_split
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import Options
from clip_retrieval.run.model import load_model, warn_of_random_weights
from clip_retrieval.run.settings import settle_options
from clip_retrieval.run.splits import make_split


@dataclass
class Member:
    """A model on its device, with its config and tokenizer, and the text before every caption (--caption_prefix)."""

    model: RetrievalModel
    built: BuiltModel
    tokenizer: Any
    caption_prefix: str | None


@dataclass
class Ensemble:
    """One or several models that encode a data set together.

    Attributes:
        members: the models; the first one is that of the options.
        options: the options of the evaluation; `evaluation.ensemble_mode` decides how features are combined.
        device: the device of the models.
        processes: they share the work.
    """

    members: list[Member]
    options: Options
    device: torch.device
    processes: Processes

    @property
    def name(self) -> str:
        """The names of the models, for results."""
        return " + ".join(member.built.name for member in self.members)

    def encode(self, dataset: RetrievalDataset) -> SplitFeatures:
        """Encode a split with all members. Each tokenizes the captions and preprocesses the images in its own way."""
        options, parts = self.options, []
        for member in self.members:
            data = replace(options.data, caption_prefix=member.caption_prefix)
            # the image cache may have to be built
            with self.processes.main_first() if options.data.image_cache else nullcontext():
                split = make_split(data, dataset, member.tokenizer, member.built.preprocess, self.device)
            encoded = encode_split(
                member.model,
                dataset,
                split.tokens,
                split.pixels,
                options.evaluation,
                num_workers=options.data.num_workers,
                device=self.device,
                processes=self.processes,
            )
            parts.append(encoded)
        seconds = {name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds}
        images, captions = ([getattr(part, side) for part in parts] for side in ("images", "captions"))
        mode = options.evaluation.ensemble_mode
        return SplitFeatures(combine(images, mode), combine(captions, mode), seconds)

    def describe(self) -> dict[str, Any]:
        """The entry of an ensemble in results.json; empty for a single model."""
        if len(self.members) == 1:
            return {}
        members = [
            {"model": member.built.name, "weights": member.built.weights}
            | ({"caption_prefix": member.caption_prefix} if member.caption_prefix else {})
            for member in self.members
        ]
        return {"ensemble": {"mode": self.options.evaluation.ensemble_mode, "members": members}}


def load_ensemble(
    options: Options, checkpoint: Checkpoint | None, device: torch.device, processes: Processes
) -> Ensemble:
    """Load the model of the options, or of their checkpoint, and those of --ensemble."""
    members = [_load_member(options, checkpoint, device, processes)]
    for path in options.evaluation.ensemble or ():
        other = Checkpoint.load_if_ours(Path(path))
        if other is not None:
            names = ["max_image_pixels", *({"caption_prefix"} & options.given)]  # the first is global
            typed = {name: getattr(options.data, name) for name in names}
            settled, other = settle_options({"resume": path, "eval": True, **typed})
        else:  # the weights of another tool, for the model that the options name
            model = replace(options.model, pretrained=path, pretrained_key=None)
            settled = replace(options, model=model, run=replace(options.run, resume=None))
        members.append(_load_member(settled, other, device, processes))
    return Ensemble(members, options, device, processes)


def _load_member(options: Options, checkpoint: Checkpoint | None, device: torch.device, processes: Processes) -> Member:
    with processes.main_first():  # it may download
        model, built, tokenizer = load_model(options, checkpoint)
    warn_of_random_weights(built)
    return Member(model.to(device), built, tokenizer, options.data.caption_prefix)


def combine(features: list[Tensor], mode: str) -> Tensor:
    """Combine the L2-normalised features (items, dim) that several models give the same items.

    "scores": concatenated and scaled, (items, sum of dims), so that inner products are the mean of the models' cosines.
    "features": the mean, normalised again, (items, dim). Raises UserError if the models have different dims.
    """
    if len(features) == 1:
        return features[0]
    if mode == "scores":
        return torch.cat(features, dim=1) / len(features) ** 0.5
    dims = [feature.shape[1] for feature in features]
    if len(set(dims)) > 1:
        raise UserError(
            f"--ensemble_mode features: the models have {', '.join(map(str, dims))} dimensions; give models of one "
            "kind, or --ensemble_mode scores"
        )
    return normalize(torch.stack(features).mean(0), dim=1)
