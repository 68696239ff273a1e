"""A Hugging Face hub of one's own, on 127.0.0.1, for the real client of `huggingface_hub`.

It speaks what a download of a model asks for: the revision, the tree, and files with their digests
and ranges. It counts the bytes it serves, and can cut a connection, spoil a file or refuse one.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")  # kept in LFS, under a SHA-256; others under git's own digest


class FakeHub:
    """Repositories by name; use it with `with`."""

    def __init__(self) -> None:
        self.commits: dict[str, Mapping[str, bytes]] = {}  # commit -> its files
        self.revisions: dict[tuple[str, str], str] = {}  # (repository, branch or tag) -> commit
        self.gated: set[str] = set()  # repositories
        self.spoiled: set[str] = set()  # files served with a bit flipped
        self.refused: set[str] = set()  # files answered with an error
        self.cuts: dict[str, int] = {}  # file -> bytes after which its connection ends, once
        self.served: Counter[str] = Counter()  # file -> bytes of its content
        self.asked: list[tuple[str, str]] = []  # (method, path)
        hub = self

        class Handler(_Handler):
            def answer(self) -> None:
                hub.asked.append((self.command, self.path))
                hub._answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(
        self, name: str, source: Path | Mapping[str, bytes], revision: str = "main"
    ) -> Mapping[str, bytes]:
        """Put a folder's files, or some bytes, under a repository's branch or tag."""
        if isinstance(source, Path):
            source = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
        told = json.dumps([name, revision, {file: _sha256(data) for file, data in source.items()}])
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.commits[commit] = source
        self.revisions[name, revision] = commit
        return source

    def environment(self, home: Path, offline: bool = False) -> dict[str, str]:
        """What a process needs to take this for the hub, with its caches under `home`."""
        return os.environ | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "XDG_CACHE_HOME": str(home / "cache"),
            "NO_PROXY": "*",
        }

    def python(
        self, home: Path, *words: object, offline: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` against this hub."""
        return subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            input="",
            timeout=120,
            env=self.environment(home, offline),
        )

    def files_asked(self) -> set[str]:
        """Files whose content or digest was asked for."""
        return {unquote(path.rpartition("/")[2]) for _, path in self.asked if "/resolve/" in path}

    def _answer(self, request: "_Handler") -> None:
        steps = unquote(urlsplit(request.path).path).strip("/").split("/")
        match steps:
            case ["api", "models", space, name, "revision", *revision]:
                self._tell_revision(request, f"{space}/{name}", "/".join(revision))
            case ["api", "models", _, _, "tree", commit]:
                files = self.commits[commit]
                request.reply_json([_entry(file, data) for file, data in files.items()])
            case [space, name, "resolve", commit, file]:
                self._give(request, f"{space}/{name}", commit, file)
            case _:
                request.reply(404, {"X-Error-Code": "RepoNotFound"})

    def _tell_revision(self, request: "_Handler", name: str, revision: str) -> None:
        if not any(name == known for known, _ in self.revisions):
            request.reply(401, {"X-Error-Code": "RepoNotFound"})
        elif (name, revision) not in self.revisions:
            request.reply(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            request.reply_json({"id": name, "sha": self.revisions[name, revision], "siblings": []})

    def _give(self, request: "_Handler", name: str, commit: str, file: str) -> None:
        if name in self.gated:
            return request.reply(403, {"X-Error-Code": "GatedRepo"})
        if file in self.refused:
            return request.reply(400, {})
        data = self.commits[commit][file]
        tag = _sha256(data) if file.endswith(LARGE) else _git(data)
        told = {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}
        if file.endswith(LARGE):
            told |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))}
        if file in self.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int((request.headers["Range"] or "bytes=0-")[len("bytes=") :].split("-")[0])
        if start:
            told["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        sent = rest[: self.cuts.pop(file, None)] if request.command == "GET" else b""
        self.served[file] += len(sent)
        request.reply(206 if start else 200, told, sent, len(rest))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.reply(200, {"Content-Type": "application/json"}, data, len(data))

    def reply(
        self, status: int, headers: Mapping[str, str], data: bytes = b"", length: int = 0
    ) -> None:
        """Answer; a body shorter than the length it announces ends the connection."""
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
            self.close_connection = len(data) < length


def _entry(file: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": file,
        "size": len(data),
        "oid": _git(data),
    }
    if file.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
