"""Hostile and extreme files, each with the command that reads it and the wanted end."""

from __future__ import annotations

from tests.faults.hostile.case import Case
from tests.faults.hostile.checkpoints import CHECKPOINTS
from tests.faults.hostile.images import IMAGES
from tests.faults.hostile.models import MODELS
from tests.faults.hostile.packed import PACKED
from tests.faults.hostile.places import PLACES
from tests.faults.hostile.texts import TEXTS
from tests.faults.hostile.weights import WEIGHTS

CASES: dict[str, Case] = {
    case.name: case for case in (*TEXTS, *IMAGES, *PACKED, *WEIGHTS, *MODELS, *CHECKPOINTS, *PLACES)
}

CORE = (
    *("coco: ids of 2^64", "karpathy: 5,000 digits", "karpathy: half a surrogate pair in a file name"),
    *("csv: a NUL in a folder", "config: 60,000 keys", "config: a billion laughs", "config: a tag that runs code"),
    *("chinese texts: half a surrogate pair", "coco ids: 10^12 numbers", "coco ids: a broken header"),
    *("features: 10^12 numbers", "gzip bomb: dataset_own.json.gz", "image: EPS", "image: a FIFO", "image: a device"),
    *("image: PNG with 2 MB of notes", "image: a scan of 180 megapixels", "image: 900 megapixels"),
    *("image: 4 x 30,000,000 pixels", "image: JPEG with a second picture", "lmdb pair: nested lists"),
    *(
        "lmdb pair: code",
        "lmdb pair: a memo of 2^28",
        "lmdb: a count of 5,000 digits",
        "lmdb: a page that is not there",
    ),
    *("shard, trained on: a sparse member of 8 GB", "shard, evaluated: a pax header of 8 GB", "shard: a FIFO"),
    *("saved folder: state.json is a FIFO", "saved folder: the data are a device", "weights: code in a checkpoint"),
    *("weights: a tensor of 10 GB by stride 0", "weights: deflated entries", "weights: pickle: a memo of 2^28"),
    *("weights: one meta tensor", "weights: a sparse tensor", "weights: a quantised tensor", "weights: NaN"),
    *("weights: NaN, to train", "weights: float16", "weights: TorchScript, a default argument that writes a file"),
    *(
        "weights: TorchScript, code under /Code/",
        "weights: TorchScript, __setstate__",
        "weights: TorchScript, a default argument that loops for ever",
        "weights: a FIFO",
    ),
    *("model config: no vision_cfg", "model config: a whole number as mean", "model config: an unknown resize mode"),
    *("model config: a patch larger than the image", "model config: 10^9 layers", "vocabulary: without [UNK]"),
    *("tokenizer folder: auto_map, typed", "tokenizer_kwargs: trust_remote_code", "last.pt: a tokenizer with code"),
    *("last.pt: moments of another shape", "last.pt: options of tensors", "last.pt: progress is a list"),
    *("run folder: metrics.jsonl with a damaged line", "run folder: log.txt is a link, fresh"),
    *("run folder: metrics.jsonl is a link, resumed", "names: classes that are not UTF-8"),
)
"""The cases of every test run: one of each kind."""
