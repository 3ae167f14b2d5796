"""Serve a page to search a folder of photographs with.

python scripts/search.py serve PHOTOS
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from pathlib import Path
from typing import Any

from clip_retrieval.errors import UserError, describe
from clip_retrieval.log import log, start_log
from clip_retrieval.search.approximate import is_wanted
from clip_retrieval.search.query import Gallery
from clip_retrieval.search.watch import Watcher

try:
    import waitress

    from clip_retrieval.search.web import LOOPBACK, MAX_BODY, make_app
except ImportError:
    raise UserError("search.py serve needs two packages: pip install flask waitress") from None

HOST, PORT = "127.0.0.1", 8000
THREADS = 4
MAX_PIXELS = 200_000_000  # of an image: anyone who reaches the page can send one
LIMITS = {
    "max_request_body_size": MAX_BODY,
    "max_request_header_size": 2**14,
    "connection_limit": 200,
    "channel_timeout": 30,  # seconds
    "cleanup_interval": 10,  # seconds
}


def serve(
    photos: Path, folder: Path, typed: dict[str, Any], *, host: str = HOST, port: int = PORT, faiss: bool | None = None
) -> None:
    """Serve the page until Ctrl-C. faiss: see `approximate.is_wanted`. Raises UserError for an unusable address."""
    start_log()
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a line for each thumbnail that waits for a thread
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: must be between 0 and 65535")
    gallery = Gallery(photos, folder, {"max_image_pixels": MAX_PIXELS, **typed})
    if faiss:
        is_wanted(len(gallery.entries), faiss)  # is it installed?
    watcher = Watcher(gallery, faiss)
    is_local = is_loopback(host)
    hosts = LOOPBACK | {host.lower(), *(() if is_local else (socket.gethostname().lower(),))}
    app = make_app(lambda: watcher.gallery, hosts, any_address=not is_local)
    try:
        server: Any = waitress.create_server(app, host=host, port=port, threads=THREADS, ident=None, **LIMITS)
    except (OSError, ValueError) as error:  # ValueError: an unknown host name
        option = "--port" if isinstance(error, OSError) else "--host"
        raise UserError(f"--host {host} --port {port}: {describe(error)}; choose another {option}") from None
    if not is_local:
        log.warning(f"--host {host}: everyone who can reach this machine can see and search the photographs")
    shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    shown = f"[{shown}]" if ":" in shown else shown
    log.info(f"{len(gallery.entries):,} images: http://{shown}:{getattr(server, 'effective_port', port)} (Ctrl-C ends)")
    watcher.start()
    server.run()  # until Ctrl-C
    server.close()
    watcher.end()


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
