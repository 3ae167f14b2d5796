"""Downloads: weights of a tag, files of a hub repository. Without a network they fail within seconds."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import huggingface_hub.constants
from open_clip.pretrained import download_pretrained

from clip_retrieval.errors import UserError
from clip_retrieval.models.libraries import quiet

FETCH_ERRORS = (OSError, RuntimeError, ValueError)
"""Errors that open_clip, huggingface_hub and transformers raise if a download fails."""

PROBE_SECONDS = 3
STALL_SECONDS = 20


@contextmanager
def hub_access() -> Iterator[None]:
    """Use only huggingface_hub's cache if the hub cannot be reached.

    By default it tries each file six times, which takes half a minute.
    """
    constants = huggingface_hub.constants
    before, stall = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        with quiet():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        socket.setdefaulttimeout(stall)


def _reachable(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return True
    try:
        with socket.create_connection((parts.hostname, parts.port or 443), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


def fetch(failure: str, *downloads: Callable[[], str]) -> str:
    """Return the path from the first download that works. Raises UserError(failure) if none does."""
    for download in downloads:
        with suppress(*FETCH_ERRORS), hub_access():
            return download()
    raise UserError(failure)


def fetch_tag(name: str, tag: str, tag_config: dict) -> str:
    """Return the path of a tag's weights, downloaded or cached.

    Tries the hub first, then the original address (its cache is shared with OpenAI's package). Raises UserError if
    both fail.
    """
    repository, url = tag_config.get("hf_hub"), tag_config.get("url")
    sources = [f"{repository.rstrip('/')} on huggingface.co"] if repository else []
    sources += [url] if url else []
    place = f", or put it at ~/.cache/clip/{url.rpartition('/')[2]}" if url else ""
    return fetch(
        f"the {tag} weights of {name} could not be fetched from {' or '.join(sources)}; check the network, or download "
        f"the file elsewhere and give it as --pretrained FILE{place}",
        *(partial(download_pretrained, tag_config, prefer_hf_hub=hub) for hub in ((True, False) if url else (True,))),
    )


def fetch_files(repository: str, files: Sequence[str], failure: str) -> str:
    """Return the path of the first of `files` that a hub repository has. Raises UserError(failure) if it has none."""
    return fetch(failure, *(partial(huggingface_hub.hf_hub_download, repository, file) for file in files))


def fetch_if_exists(repository: str, file: str) -> str | None:
    """Return the path of a file of a hub repository, or None if it cannot be fetched."""
    with suppress(UserError):
        return fetch_files(repository, [file], "")
    return None


def fetch_small_files(repository: str, failure: str) -> str:
    """Return the folder with the configs and the tokenizer of a hub repository. Raises UserError(failure)."""
    patterns = ["*.json", "*.txt", "*.model"]
    return fetch(failure, partial(huggingface_hub.snapshot_download, repository, allow_patterns=patterns))
