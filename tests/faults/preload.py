"""Import all modules that a run needs, before it is forked."""

import importlib

NAMES = (
    *(
        "classification.archives",
        "data.image_cache",
        "data.readers.chinese",
        "data.readers.coco",
        "data.readers.csv_file",
    ),
    *("data.readers.huggingface", "data.readers.karpathy", "data.readers.webdataset", "evaluate", "finetune"),
    *("retrieval.predictions", "evaluation.features", "zero_shot"),
)
for name in (*(f"clip_retrieval.{name}" for name in NAMES), "torch.utils.tensorboard", "tests.faults.fuzz"):
    importlib.import_module(name)
# transformers imports lazily.
for name in ("AutoTokenizer", "BertConfig", "BertModel", "BertTokenizer", "DistilBertModel"):
    getattr(importlib.import_module("transformers"), name)
