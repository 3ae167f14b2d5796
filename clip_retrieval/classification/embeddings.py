"""Image features, and an embedding of each class from its prompts, in one space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_retrieval.classification.templates import Templates
from clip_retrieval.data.captions import Tokens, tokenize
from clip_retrieval.data.dataset import UNSPLIT, Images, RetrievalDataset
from clip_retrieval.data.pixels.pixels import Pixels, make_pixels
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import format_share
from clip_retrieval.evaluation.evaluator import encode_split
from clip_retrieval.log import log
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import EvalOptions


@dataclass(frozen=True)
class ClassificationFeatures:
    """L2-normalised features, float32 (images, dim) and (classes, dim), and the seconds it took to compute them."""

    images: Tensor
    classes: Tensor
    seconds: dict[str, float]


@dataclass(frozen=True)
class PromptedImages:
    """Preprocessed images and tokenised class prompts, without labels."""

    dataset: RetrievalDataset
    tokens: Tokens
    pixels: Pixels
    classes: int

    def encode(
        self,
        model: RetrievalModel,
        options: EvalOptions,
        *,
        num_workers: int | None,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
    ) -> ClassificationFeatures:
        """Encode images and prompts. The model must be on `device`; its training mode stays."""
        shared: dict[str, Any] = {"num_workers": num_workers, "device": device, "processes": processes}
        encoded = encode_split(model, self.dataset, self.tokens, self.pixels, options, **shared)
        seconds = {"images": encoded.seconds["images"], "classes": encoded.seconds["captions"]}
        return ClassificationFeatures(encoded.images, class_embeddings(encoded.captions, self.classes), seconds)


def prompt_classes(
    name: str, images: Images, class_names: list[str], templates: Templates, tokenizer: Any, preprocess: dict[str, Any]
) -> PromptedImages:
    """Tokenise the class prompts and set up the preprocessing. tokenizer and preprocess are the model's."""
    prompts = templates.prompts(class_names)
    tokens = tokenize(prompts, tokenizer)
    if tokens.cut:
        log.info(f"{format_share(tokens.cut, len(prompts), 'prompt')} cut to {tokens.ids.shape[1]} tokens")
    dataset = RetrievalDataset(name, UNSPLIT, images, prompts, np.empty((0, 2), np.int64))
    return PromptedImages(dataset, tokens, make_pixels(images, preprocess), len(class_names))


def class_embeddings(prompts: Tensor, classes: int) -> Tensor:
    """The L2-normalised mean of each class's normalised prompt embeddings, (classes, dim).

    prompts is (classes * templates, dim), class by class. CLIP's recipe (arXiv:2103.00020, section 3.1.4).
    """
    return F.normalize(prompts.unflatten(0, (classes, -1)).mean(1), dim=-1)
