"""Read shards from web servers and object stores, from front to back.

A lost connection is opened again at the byte that it reached, a few times. No answer decides what is run or written:
addresses of other protocols (files, archives, caches, pipes of a shell) are refused.
"""

from __future__ import annotations

import functools
import http.client
import importlib.util
import multiprocessing
import posixpath
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from clip_retrieval.errors import RunError, UserError, describe
from clip_retrieval.log import log

WEB = ("http", "https")
STORES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""Protocols that fsspec reads, and the packages that it needs for them."""
TRIES = 6  # connections in a row that bring nothing
MAX_CONNECTIONS = 1000  # of one reading of a shard
FIRST_WAIT = 1.0  # seconds before the second try; doubled for each further one
TIMEOUT = 30  # seconds without an answer
READ_BYTES = 2**16  # read from a connection at a time
BLOCK_BYTES = 2**22  # fetched from a store at a time
MAX_SHARD_BYTES = 2**34  # a server may send without end
_LATER = (408, 425, 429)  # HTTP errors of the moment, besides those from 500 on
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://.")


@dataclass(frozen=True)
class Url:
    """The address of a shard. Its text has no query, which may hold a password."""

    address: str

    def __str__(self) -> str:
        return self.address.partition("?")[0]

    @property
    def protocol(self) -> str:
        return self.address.partition(":")[0].lower()

    @property
    def name(self) -> str:
        """The file's name."""
        return posixpath.basename(str(self))

    def beside(self, name: str) -> Url:
        """Return the address of another file in the folder."""
        return Url(f"{posixpath.dirname(str(self))}/{name}")


def is_url(text: str) -> bool:
    """Whether a text is an address, `PROTOCOL://...`, or a pipe of webdataset."""
    return bool(_URL.match(text)) or text.startswith("pipe:")


def check_protocol(address: str, source: str) -> None:
    """Raise UserError, naming `source`, if an address has another protocol, or needs a package that is missing."""
    protocol = Url(address).protocol
    if protocol not in (*WEB, *STORES):
        known = ", ".join((*WEB, *STORES))
        problem = "runs a program, which is not allowed" if protocol == "pipe" else "is not supported"
        raise UserError(f"{source}: {protocol}: {problem}; give an address ({known}) or a path")
    package = STORES.get(protocol)
    if package and not importlib.util.find_spec(package):
        raise UserError(f"{source}: {protocol}:// needs {package} (pip install {package})")


@functools.cache
def list_store(pattern: str, source: str) -> list[Url]:
    """List the addresses that match a pattern with wildcards. Raises UserError if the store cannot list them."""
    if Url(pattern).protocol in WEB:
        raise UserError(f"{source}: web servers do not list files; write numbers in braces, {{00000..00099}}")
    try:
        store = _open_store(pattern)
        return [Url(store.unstrip_protocol(path)) for path in sorted(store.glob(pattern))]
    except Exception as error:  # each store has its own
        raise UserError(f"{source}: {pattern} cannot be listed ({describe(error)})") from None


def read_small(url: Url, limit: int) -> bytes | None:
    """Read a small file; None if there is none. Raises UserError if it has more than `limit` bytes, and RunError."""
    file = RemoteFile(url)
    data = bytearray()
    try:
        while chunk := file.read(READ_BYTES):
            data += chunk
            if len(data) > limit:
                raise UserError(f"{url}: larger than {limit:,} bytes; correct or delete the file")
    except MissingError:
        return None
    finally:
        file.close()
    return bytes(data)


class MissingError(UserError):
    """The server has no such file, or does not show it: stores answer the same to strangers."""


class RemoteFile:
    """A remote file, read from front to back.

    Reading raises MissingError or UserError if the server refuses the file, and RunError if it fails TRIES times in a
    row.
    """

    def __init__(self, url: Url):
        self.url = url
        self._position = 0
        self._ahead = b""
        self._connection: Any = None  # an HTTP response, or a file of fsspec
        self._total: int | None = None
        self._failures = self._connections = 0

    def peek(self, number: int) -> bytes:
        """Read the first bytes, and keep them for the next `read`."""
        self._ahead = self.read(number)
        return self._ahead

    def read(self, number: int = READ_BYTES) -> bytes:
        """Read the next bytes, at most `number` and READ_BYTES; none at the end."""
        if self._ahead:
            part, self._ahead = self._ahead[:number], self._ahead[number:]
            return part
        while True:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                part = self._connection.read(min(number, READ_BYTES))
                if not part and getattr(self._connection, "length", None):
                    raise ConnectionError("the connection was closed early")
                break
            except (UserError, MemoryError):
                raise
            except Exception as error:  # each store has its own
                self.close()
                self._wait(error)
        self._position += len(part)
        self._failures = 0 if part else self._failures
        if self._position > MAX_SHARD_BYTES:
            raise UserError(f"{self.url}: more than {MAX_SHARD_BYTES >> 30} GiB, too large for a shard; split it")
        return part

    def tell(self) -> int:
        """Bytes received."""
        return self._position

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> Any:
        """Open the file at the position."""
        self._connections += 1
        if self.url.protocol not in WEB:
            return _open_in_store(self.url, self._position)
        response, begin = _request(self.url, self._position)
        # the same file as before: from its beginning, if the server knows no ranges
        total = None if response.length is None else begin + response.length
        if self._total is not None and total not in (None, self._total):
            response.close()
            raise UserError(f"{self.url}: changed from {self._total:,} to {total:,} bytes while it was read")
        self._total = self._total if total is None else total
        while begin < self._position:
            if not (part := response.read(min(READ_BYTES, self._position - begin))):
                raise ConnectionError("the connection was closed early")
            begin += len(part)
        return response

    def _wait(self, error: Exception) -> None:
        """Wait before the next try. Raises RunError after the last one."""
        self._failures += 1
        cause = getattr(error, "reason", None)  # of urllib's errors
        reason = describe(cause if isinstance(cause, Exception) else error)
        if self._failures >= TRIES or self._connections >= MAX_CONNECTIONS:
            raise RunError(
                f"{self.url}: the server failed {self._failures} times in a row at byte {self._position:,} "
                f"({reason}); when it is back, --resume auto continues the run"
            ) from None
        if self._failures == 2 and multiprocessing.parent_process() is None:  # workers do not log
            log.warning(f"{self.url}: the server failed twice at byte {self._position:,} ({reason}); trying again")
        time.sleep(FIRST_WAIT * 2 ** (self._failures - 1))


@functools.cache
def _make_opener() -> urllib.request.OpenerDirector:
    """Make an opener for web addresses only: a redirection leads nowhere else."""
    opener = urllib.request.OpenerDirector()
    for name in ("Proxy", "HTTP", "HTTPS", "HTTPRedirect", "HTTPDefaultError", "Unknown"):
        opener.add_handler(getattr(urllib.request, f"{name}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    return opener


def _request(url: Url, position: int) -> tuple[http.client.HTTPResponse, int]:
    """Request a web address from a byte on; return the response and its first byte, 0 if the server knows no ranges.

    Raises UserError if the server refuses for good, and OSError or HTTPException for a fault of the moment.
    """
    headers = {"User-Agent": "clip_retrieval", "Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
    address = urllib.parse.quote(url.address, safe="%/:=&?~#+!$,;'@()*[]")
    try:
        response = _make_opener().open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _LATER or error.code >= 500:
            raise ConnectionError(f"HTTP {error.code}") from None
        if error.code < 400:
            raise UserError(f"{url}: redirected without end, or to no web address; give the final address") from None
        kind = MissingError if error.code in (401, 403, 404, 410) else UserError
        raise kind(f"{url}: refused by the server (HTTP {error.code}); correct the address") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"{url}: not a valid address ({describe(error)})") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(f"{url}: its certificate is not valid ({error.reason.verify_message})") from None
        if isinstance(error.reason, str):  # not an error of the network
            raise UserError(f"{url}: not a valid address ({error.reason})") from None
        raise
    span = response.headers.get("Content-Range") or ""
    begin = int(found[1]) if (found := re.match(r"bytes (\d+)-", span)) else position + 1
    if response.status == 206 and begin > position:
        response.close()
        raise ConnectionError(f"the server sent {span or 'an unknown part'} instead of byte {position:,}")
    begin = begin if response.status == 206 else 0
    return response, begin


def _open_store(address: str) -> Any:
    """Open the store of an address, with fsspec's settings for it. Not cached: its threads do not survive a fork."""
    import fsspec

    return fsspec.filesystem(Url(address).protocol, skip_instance_cache=True)


def _open_in_store(url: Url, position: int) -> Any:
    """Open a file of a store at a byte. Raises UserError if the store refuses it for good."""
    try:
        file = _open_store(url.address).open(url.address, "rb", block_size=BLOCK_BYTES)
        file.seek(position)
        return file
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise MissingError(f"{url}: refused by the store ({describe(error)}); correct the address") from None
    except Exception as error:
        if isinstance(error, ImportError) or "Credentials" in type(error).__name__:
            raise UserError(f"{url}: cannot be opened ({describe(error)})") from None
        raise
