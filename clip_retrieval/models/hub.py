"""Downloads: weights of a tag, files of a hub repository. Without a network they fail within seconds."""

from __future__ import annotations

import logging
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.constants
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

from clip_retrieval.errors import UserError

FETCH_ERRORS = (OSError, RuntimeError, ValueError)
"""Errors that open_clip, huggingface_hub and transformers raise if a download fails."""

PROBE_SECONDS = 3
STALL_SECONDS = 20


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


def fetch_tag(name: str, tag: str, tag_config: dict) -> str:
    """Return the path of a tag's weights, downloaded or cached.

    Tries the hub first, then the original address (its cache is shared with OpenAI's package). Raises UserError if
    both fail.
    """
    sources = [tag_config["hf_hub"].rstrip("/") + " on huggingface.co"] if tag_config.get("hf_hub") else []
    sources += [tag_config["url"]] if tag_config.get("url") else []
    for prefer_hub in (True, False):
        if not prefer_hub and not tag_config.get("url"):
            continue
        try:
            with hub_access():
                return download_pretrained(tag_config, prefer_hf_hub=prefer_hub)
        except FETCH_ERRORS:
            continue
    url = tag_config.get("url")
    place = f", or put it at ~/.cache/clip/{url.rpartition('/')[2]}" if url else ""
    raise UserError(
        f"the {tag} weights of {name} could not be fetched from {' or '.join(sources)}; check the network, or download "
        f"the file elsewhere and give it as --pretrained FILE{place}"
    )


def fetch_hub_config(hub_id: str) -> str:
    """Return the path of a hub repository's open_clip_config.json. Raises UserError if it cannot be fetched."""
    try:
        with hub_access():
            return download_pretrained_from_hf(hub_id, filename="open_clip_config.json")
    except FETCH_ERRORS:
        raise UserError(
            f"open_clip_config.json of hf-hub:{hub_id} could not be fetched from huggingface.co; check the name and "
            "the network, or download the repository elsewhere and give its folder as --vision_model local-dir:PATH"
        ) from None


def fetch_hub_weights(hub_id: str) -> str:
    """Return the path of a hub repository's weights. Raises UserError if they cannot be fetched."""
    try:
        with hub_access():
            return download_pretrained_from_hf(hub_id)
    except FETCH_ERRORS:
        raise UserError(
            f"the weights of hf-hub:{hub_id} could not be fetched from huggingface.co; check the network, or download "
            "them elsewhere and give them as --pretrained FILE"
        ) from None


BERT_FILES = ("model.safetensors", "pytorch_model.bin")


def fetch_bert(name: str) -> str:
    """Return the path of a BERT's weights from the hub. Raises UserError if they cannot be fetched."""
    for file in BERT_FILES:
        try:
            with hub_access():
                return huggingface_hub.hf_hub_download(name, file)
        except FETCH_ERRORS:
            continue
    raise UserError(
        f"--text_pretrained {name}: no such file or folder, and its weights could not be fetched from huggingface.co; "
        "give the folder of a downloaded BERT"
    )
