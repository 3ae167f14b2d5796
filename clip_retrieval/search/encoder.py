"""The model of an index: it encodes photographs and queries."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clip_retrieval.data.captions import clean_caption, tokenize
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.device import choose_device, disable_tf32
from clip_retrieval.encode import IMAGE_BATCH_SIZE, encoding_model
from clip_retrieval.errors import NotFiniteError
from clip_retrieval.files import to_json
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.run.model import load_model, warn_of_random_weights
from clip_retrieval.run.settings import settle_options

SAMPLED = 1024  # numbers of each weight that the fingerprint uses


class Encoder:
    """Encodes images and texts as float32 (n, dim), L2-normalised, on the CPU. Several threads may use it.

    Attributes:
        record: the model in an index: `source`, `name`, `fingerprint` and `dim`, the dimensions of the features.
        preprocess: open_clip's preprocessing, as a dict.
        batch_size: images to encode at a time.
    """

    def __init__(self, source: dict[str, Any], typed: dict[str, Any]):
        """Load the model of a source. typed: options of this machine (device, eval_batch_size, ...)."""
        options, checkpoint = settle_options({**typed, **source["options"], "eval": True})
        self.num_workers, self._prefix = options.data.num_workers, options.data.caption_prefix
        self.device = choose_device(options.run.device)
        model, built, self._tokenizer = load_model(options, checkpoint)
        warn_of_random_weights(built)
        self.preprocess = model.preprocess
        fingerprint = fingerprint_model(model)
        self._model = encoding_model(model.to(self.device), options.evaluation.eval_precision)
        self._transform = ImageTransform(self.preprocess)
        self._lock = threading.Lock()  # disable_tf32 changes global settings
        self.batch_size = options.evaluation.eval_batch_size or IMAGE_BATCH_SIZE[self.device.type]
        dim = self.encode_texts(["a photo"]).shape[1]
        self.record: dict[str, Any] = {
            "source": source,
            "name": built.name,
            "fingerprint": fingerprint,
            "dim": dim,
        }

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, after the --caption_prefix of the checkpoint; longer ones are cut to the context length."""
        tokens = tokenize([clean_caption(text) for text in texts], self._tokenizer, self._prefix)
        longest = int(tokens.lengths.max()) if self._model.trims_text else None
        return self._encode(self._model.encode_text, tokens.ids[:, :longest].long(), tokens.lengths)

    def encode_photos(self, photos: Sequence[Image.Image]) -> Tensor:
        """Encode RGB images."""
        return self.encode_pixels(torch.stack([self._transform(photo) for photo in photos]))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode transformed images, uint8 (n, 3, height, width)."""
        return self._encode(self._model.encode_image, pixels)

    def _encode(self, encode: Any, inputs: Tensor, *further: Tensor) -> Tensor:
        with self._lock, torch.inference_mode(), disable_tf32():
            features = encode(inputs.to(self.device), *further).cpu()
        if not features.isfinite().all():
            raise NotFiniteError("a feature of the model is not finite; choose another checkpoint")
        return features


def fingerprint_model(model: RetrievalModel) -> str:
    """Return a hash of the preprocessing and of SAMPLED numbers of each weight: any training changes it."""
    known = hashlib.blake2b(to_json(model.preprocess), digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)].cpu()
        known.update(f"{name} {tuple(weight.shape)}".encode() + sample.double().numpy().tobytes())
    return known.hexdigest()
