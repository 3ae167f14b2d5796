"""Import all modules of a run, and read the tokenizer, before it is forked."""

import importlib

READERS = ("chinese", "coco", "csv_file", "huggingface", "karpathy", "webdataset")
MODULES = (
    *("clip_retrieval.evaluate", "clip_retrieval.finetune", "clip_retrieval.zero_shot"),
    *("clip_retrieval.classification.archives", "clip_retrieval.data.pixels.cache"),
    *("clip_retrieval.retrieval.features", "clip_retrieval.retrieval.predictions"),
    *(f"clip_retrieval.data.readers.{name}" for name in READERS),
    *("torch.utils.tensorboard", "tests.faults.fuzz"),
)
for module in MODULES:
    importlib.import_module(module)
# transformers imports lazily.
for name in ("AutoTokenizer", "BertConfig", "BertModel", "BertTokenizer", "DistilBertModel"):
    getattr(importlib.import_module("transformers"), name)
importlib.import_module("clip_retrieval.models.tokenizers")._read_clip_tokenizer()
