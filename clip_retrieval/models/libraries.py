"""Calls of other libraries: silence their messages, translate their errors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from clip_retrieval.errors import UserError, describe


@contextmanager
def quiet() -> Iterator[None]:
    """Silence log lines and warnings of the libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def translate_errors(problem: str, remedy: str = "give another file") -> Iterator[None]:
    """Silence the libraries and translate every error, which may be of any type, to UserError(problem; remedy)."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem} ({describe(error)}); {remedy}") from error
