"""The web application: a page, a search, and reduced images of the index.

    GET  /                           the page
    GET  /info                       {"folder": name, "images": number, "model": name}
    GET  /search?q=TEXT&not=TEXT&like=IMAGE&k=N    {"results": [{"row", "score", "name", "width", "height", "version"}]}
    POST /search?q=TEXT&not=TEXT&k=N             the same; the body is an image to search for
    GET  /image/IMAGE/small, /image/IMAGE/large      JPEG

An IMAGE is a row of the index, or ROW-VERSION, which another content does not have, never a path. Requests of other
sites are refused: by the Host header, a name that another site points to this machine, and by Origin and
Sec-Fetch-Site, a page of another site in the browser.
"""

from __future__ import annotations

import io
import ipaddress
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from flask import Flask, Response, abort, jsonify, request
from werkzeug.exceptions import HTTPException

from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.data.images.photographs import prepare_photo
from clip_retrieval.errors import NotFiniteError, RunError, UserError
from clip_retrieval.search.index import Entry
from clip_retrieval.search.query import Gallery
from clip_retrieval.search.thumbnails import SIDES, Thumbnails

MAX_BODY = 32 * 2**20  # bytes of an image to search for
MAX_TEXT = 1000  # characters
MAX_RESULTS = 500
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def make_app(current: Callable[[], Gallery], hosts: Collection[str] = LOOPBACK, any_address: bool = False) -> Flask:
    """Make the application.

    current: returns the gallery, which may be another one after an update of the index. hosts: the names in the Host
    header that are accepted; with any_address, also every IP address, which another site cannot take over as it can a
    name.
    """
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.url_map.merge_slashes = False  # it would redirect
    app.json.sort_keys = False  # type: ignore[attr-defined]
    protect(app, hosts, any_address)
    thumbnails = Thumbnails()

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("index.html")

    @app.get("/info")
    def info() -> Response:
        gallery = current()
        model = gallery.index.model["name"]
        return jsonify(folder=gallery.photos.resolve().name, images=len(gallery.entries), model=model)

    @app.route("/search", methods=["GET", "POST"])
    def find() -> Response:
        gallery = current()
        texts, negatives = read_text("q"), read_text("not")
        rows = [read_row(gallery, request.args["like"])] if request.args.get("like") else []
        images = []
        if request.method == "POST":
            with thumbnails.decoding:
                images = [decode_rgb(io.BytesIO(request.get_data()), "the image", prepare_photo)]
        count = min(max(request.args.get("k", 60, type=int), 1), MAX_RESULTS)
        if texts or rows or images:
            query = gallery.encode_query(texts, images, rows, negatives)
            best, scores = gallery.search(query, count)
            return jsonify(results=[describe(gallery, *found) for found in zip(best.tolist(), scores.tolist())])
        spread = np.linspace(0, len(gallery.entries) - 1, min(count, len(gallery.entries))).round().astype(int)
        return jsonify(results=[describe(gallery, row, None) for row in spread.tolist()])

    @app.get("/image/<row>/<size>")
    def image(row: str, size: str) -> Response:
        if size not in SIDES:
            abort(404)
        gallery = current()
        try:
            content = thumbnails.get(str(gallery.path(read_row(gallery, row))), size)
        except UserError:  # deleted or replaced since it was indexed; its message holds the path
            abort(404, "the image cannot be read; update the index")
        # the address has the version of the content: another content has another address
        return Response(content, mimetype="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    return app


def protect(app: Flask, hosts: Collection[str], any_address: bool) -> None:
    """Refuse requests of other sites, add the headers of a private page, and answer errors in JSON."""

    @app.before_request
    def refuse_other_sites() -> None:
        if not is_trusted(request.headers.get("Host", ""), hosts, any_address):
            abort(403, "unknown host name; open the address that search.py printed")
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"{request.scheme}://{request.headers['Host']}":
            abort(403, "request of another site")
        if request.path != "/" and request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            abort(403, "request of another site")

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.errorhandler(HTTPException)
    def explain_http_error(error: HTTPException) -> tuple[Response, int]:
        return jsonify(error=error.description), error.code or 500

    @app.errorhandler(UserError)
    @app.errorhandler(NotFiniteError)
    @app.errorhandler(RunError)
    def explain_error(error: Exception) -> tuple[Response, int]:
        return jsonify(error=str(error)), 400


def read_text(name: str) -> list[str]:
    text = request.args.get(name, "").strip()
    if len(text) > MAX_TEXT:
        abort(400, f"the text has more than {MAX_TEXT:,} characters")
    return [text] if text else []


def read_row(gallery: Gallery, text: str) -> int:
    """The row of ROW or ROW-VERSION; 404 if the index has changed and has another image there."""
    number, _, version = text.partition("-")
    if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) < len(gallery.entries)):
        abort(404, "no such image in the index")
    if version and version != read_version(gallery.entries[int(number)]):
        abort(404, "the index has changed; search again")
    return int(number)


def describe(gallery: Gallery, row: int, score: float | None) -> dict[str, Any]:
    entry = gallery.entries[row]
    shown = {"name": entry.name, "width": entry.width, "height": entry.height, "version": read_version(entry)}
    return {"row": row, "score": score, **shown}


def read_version(entry: Entry) -> str:
    """The start of the hash of a file: the version in the addresses of its image."""
    return (entry.digest or "")[:8]


def is_trusted(host: str, hosts: Collection[str], any_address: bool) -> bool:
    """Whether a Host header, with or without a port, is one of the names, or an IP address if these are accepted."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in hosts:
        return True
    try:
        return any_address and bool(ipaddress.ip_address(name))
    except ValueError:
        return False
