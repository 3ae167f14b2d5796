"""A web server of a folder that fails in chosen ways."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ShardServer:
    """Serves a folder. Attributes change its behaviour at any time.

    Attributes:
        ranges: whether `Range` is obeyed.
        silent: answer a range without saying which.
        length: whether the length of a body is announced.
        faults: the fault of each next request, in order: None, "500", "404", "drop" (half of the body, then the
            connection ends), "reset" (at once), "redirect" (to itself), "file" (redirects to a local file).
        requests: (path, first byte) of each request so far.
        down: refuse all requests with 503.
        endless: bytes that are repeated without end as every body.
    """

    def __init__(self, folder):
        self.folder = folder
        self.ranges, self.length, self.down, self.silent = True, True, False, False
        self.faults = []
        self.requests = []
        self.endless = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(ConnectionError):
                    outer._answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler):
        begin = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        self.requests.append((handler.path, begin))
        fault = self.faults.pop(0) if self.faults else None
        path = self.folder / handler.path.partition("?")[0].lstrip("/")
        if fault == "reset":
            return
        if self.down or fault == "500":
            handler.send_error(503 if self.down else 500)
        elif fault in ("redirect", "file"):
            handler.send_response(302)
            handler.send_header("Location", "file:///etc/hostname" if fault == "file" else handler.path)
            handler.end_headers()
        elif self.endless is not None:
            handler.send_response(200)
            handler.end_headers()
            while True:
                handler.wfile.write(self.endless)
        elif fault == "404" or not path.is_file():
            handler.send_error(404)
        else:
            self._send(handler, path.read_bytes(), begin if self.ranges else 0, fault)

    def _send(self, handler, content, begin, fault):
        handler.send_response(206 if begin else 200)
        if begin and not self.silent:
            handler.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if self.length:
            handler.send_header("Content-Length", str(len(content) - begin))
        handler.end_headers()
        body = content[begin:]
        handler.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
        if fault == "drop":
            handler.wfile.flush()
            time.sleep(0.01)
