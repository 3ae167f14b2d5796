"""What comes from the network: weights of a tag, files of a hub id. Without a network it fails within seconds."""

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

# What open_clip, huggingface_hub and transformers raise where a file cannot be had.
FETCH_ERRORS = (OSError, RuntimeError, ValueError)
PROBE_SECONDS = 3
STALL_SECONDS = 20


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log lines and warnings of the libraries."""
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
    """Look only at huggingface_hub's cache where the hub cannot be reached.

    Left to itself it tries each file six times, which takes half a minute.
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
    """Path of the weights of an open_clip tag, downloaded or from the cache.

    The hub is asked first, then the address it was first published at (whose cache OpenAI's package shares). Raises
    UserError where neither gives it.
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
    place = f", or put at ~/.cache/clip/{url.rpartition('/')[2]}" if url else ""
    raise UserError(
        f"the {tag} weights of {name} could not be fetched from {' or '.join(sources)}; is there a network? A file "
        f"that was downloaded elsewhere is given as --pretrained FILE{place}"
    )


def fetch_hub_config(hub_id: str) -> str:
    """Path of the open_clip_config.json of a hub repository. Raises UserError where it cannot be had."""
    try:
        with hub_access():
            return download_pretrained_from_hf(hub_id, filename="open_clip_config.json")
    except FETCH_ERRORS:
        raise UserError(
            f"open_clip_config.json of hf-hub:{hub_id} could not be fetched from huggingface.co; check the name and "
            "the network, or download the repository elsewhere and give its folder as --vision_model local-dir:PATH"
        ) from None


def fetch_hub_weights(hub_id: str) -> str:
    """Path of the weights of a hub repository. Raises UserError where they cannot be had."""
    try:
        with hub_access():
            return download_pretrained_from_hf(hub_id)
    except FETCH_ERRORS:
        raise UserError(
            f"the weights of hf-hub:{hub_id} could not be fetched from huggingface.co; is there a network? A file "
            "that was downloaded elsewhere is given as --pretrained FILE"
        ) from None


BERT_FILES = ("model.safetensors", "pytorch_model.bin")


def fetch_bert(name: str) -> str:
    """Path of the weights of a BERT on the hub. Raises UserError where they cannot be had."""
    for file in BERT_FILES:
        try:
            with hub_access():
                return huggingface_hub.hf_hub_download(name, file)
        except FETCH_ERRORS:
            continue
    raise UserError(
        f"--text_pretrained {name}: no such file or folder, and its weights could not be fetched from huggingface.co; "
        "give the folder that a BERT was downloaded to"
    )
