"""Finetune and evaluate CLIP models for image-text retrieval.

    from clip_retrieval import evaluate_features, load_model, read_dataset, retrieval_ranks

The functions are imported on first use: importing the package loads nothing and changes nothing in the process.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_retrieval.api import load_model, read_dataset
    from clip_retrieval.evaluation.ranks import retrieval_ranks
    from clip_retrieval.retrieval.evaluate_features import evaluate_features

__version__ = "0.9.0"
__all__ = ["evaluate_features", "load_model", "read_dataset", "retrieval_ranks"]

_MODULES = {
    "evaluate_features": "retrieval.evaluate_features",
    "load_model": "api",
    "read_dataset": "api",
    "retrieval_ranks": "evaluation.ranks",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
