"""Where the files of a packed folder come from: a web server, an object store, the hub.

A transport gives a file's bytes from some position on, or says that it must begin at the start. It
vouches for nothing: whoever asks counts the bytes and digests them.
"""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from star_elastic.folder import CheckpointError, one_line

CHUNK = 2**20  # bytes that are asked for at once
_TIMEOUT = 60  # seconds without a byte
Chunks = Iterator[bytes]


class TransportError(Exception):
    """A file that cannot be had; `lasting` if asking again would not help."""

    def __init__(self, message: str, lasting: bool):
        super().__init__(message)
        self.lasting = lasting


class Transport(Protocol):
    """A packed folder somewhere else."""

    def open(self, path: str, start: int) -> Any:
        """A context of (position, chunks): the bytes of a file from a position on.

        The position is `start`, or 0 where the other side cannot begin there.

        Raises:
            TransportError: on entering, or while chunks are asked for.
        """
        ...


class Web:
    """A folder under an http(s) URL; its query, if it has one, goes along with every file."""

    def __init__(self, url: str):
        self._url = urllib.parse.urlsplit(url)
        self._opener = urllib.request.build_opener(_WebOnly)

    @contextmanager
    def open(self, path: str, start: int) -> Iterator[tuple[int, Chunks]]:
        """See `Transport`; the server need not know ranges."""
        place = self._url.path.rstrip("/") + "/" + urllib.parse.quote(path)
        url = urllib.parse.urlunsplit(self._url._replace(path=place, fragment=""))
        headers = {"Accept-Encoding": "identity", "User-Agent": "star-elastic"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with _told(_web_error):
            answer = self._opener.open(urllib.request.Request(url, headers=headers), None, _TIMEOUT)
        with answer:
            told = str(answer.headers.get("Content-Range", ""))
            resumed = answer.status == 206 and told.startswith(f"bytes {start}-")
            if answer.status == 206 and not resumed:
                raise TransportError(f"asked from byte {start}, got {told[:80]!r}", True)
            yield (start if resumed else 0), _chunks(answer, _web_error)


class Store:
    """A folder of any scheme that fsspec has a package for: s3://, gs://, sftp://, memory://."""

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        try:
            self._files, self._root = url_to_fs(url)
        except ImportError as error:  # says which package to install
            raise CheckpointError(f"{url}: {one_line(error)}") from None
        except Exception as error:  # every file system has errors of its own
            raise CheckpointError(f"{url}: {one_line(error)}") from None

    @contextmanager
    def open(self, path: str, start: int) -> Iterator[tuple[int, Chunks]]:
        """See `Transport`."""
        with _told(_store_error):
            opened = self._files.open(f"{self._root.rstrip('/')}/{path}", "rb")
        with opened:
            with _told(_store_error):
                start = opened.seek(start) if opened.seekable() else 0
            yield start, _chunks(opened, _store_error)


class Hub:
    """A repository of the Hugging Face hub; its own client resumes and keeps what it downloads."""

    def __init__(self, source: str):
        self._name, _, self._revision = source.partition("@")

    @contextmanager
    def open(self, path: str, start: int) -> Iterator[tuple[int, Chunks]]:
        """See `Transport`."""
        with self.local(path).open("rb") as opened:
            opened.seek(start)
            yield start, _chunks(opened, _store_error)

    def local(self, path: str) -> Path:
        """Where the hub's client keeps a file, once it has it."""
        from huggingface_hub import hf_hub_download

        with _told(lambda error: TransportError(one_line(error), True)):  # it has tried for long
            found = Path(hf_hub_download(self._name, path, revision=self._revision or None))
        if found.parent.parent.name == "snapshots":  # all other files are of the same commit
            self._revision = found.parent.name
        return found.resolve()


def transport_of(source: str) -> Transport:
    """What fetches from a source that is no folder here.

    Raises:
        CheckpointError: neither a folder, nor a URL of a known scheme, nor a repository id.
    """
    scheme, mark, _ = source.partition("://")
    if mark and scheme.lower() in ("http", "https"):
        return Web(source)
    if mark:
        return Store(source)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return Hub(source)
    raise CheckpointError(f"{source}: neither a folder, nor a URL, nor a repository of the hub")


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Redirects stay with http(s), and never leave https for http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):
        wanted = ("https",) if req.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(newurl).scheme not in wanted:
            raise TransportError(f"redirected to {newurl[:200]!r}", True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _chunks(opened: Any, kind: Callable[[Exception], TransportError | None]) -> Chunks:
    while True:
        with _told(kind):
            data = opened.read(CHUNK)
        if not data:
            return
        yield data


@contextmanager
def _told(kind: Callable[[Exception], TransportError | None]) -> Iterator[None]:
    """Errors of the other side as `TransportError`; around nothing that touches our own disk."""
    try:
        yield
    except Exception as error:
        told = kind(error)
        if told is None:
            raise
        raise told from None


def _web_error(error: Exception) -> TransportError | None:
    if isinstance(error, urllib.error.HTTPError):
        lasting = error.code < 500 and error.code not in (408, 416, 429)
        return TransportError(f"HTTP status {error.code}", lasting)
    if isinstance(error, OSError | http.client.HTTPException):  # reset, timeout, no such host
        return TransportError(one_line(error), False)
    return None


def _store_error(error: Exception) -> TransportError | None:
    """Every file system has errors of its own."""
    if isinstance(error, FileNotFoundError):
        return TransportError("no such file", True)
    return TransportError(one_line(error), isinstance(error, PermissionError | ImportError))
