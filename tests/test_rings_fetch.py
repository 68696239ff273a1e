"""Rings over HTTP, object stores and the hub: what is moved is counted, and held to its digest."""

import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from email.message import Message
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest
from models import elastic

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError
from star_elastic.rings import fetch, open_packed, pack, unpack
from star_elastic.rings.manifest import Manifest
from star_elastic.rings.transports import TransportError, _WebOnly
from star_elastic.slicing import slice_checkpoint

HOME = TemporaryDirectory(prefix="rings-")  # removed with this module
RING = "ring-1-prefix/model.safetensors"
COMMIT = "0123456789" * 4


class Site:
    """A web server over a folder: it counts what it serves and fails when it is told to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.served: Counter[str] = Counter()  # file -> bytes of its content
        self.asked: list[tuple[str, str | None]] = []  # (file, range)
        self.queries: set[str] = set()
        self.knows_ranges = True
        self.cuts: dict[str, list[int]] = {}  # file -> bytes after which connections end, in turn
        self.statuses: dict[str, int] = {}  # file -> an error
        self.contents: dict[str, bytes] = {}  # file -> other bytes than the folder's
        self.redirects: dict[str, str] = {}
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/models/tiny/"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.removeprefix("/models/tiny/").partition("?")
        self.queries.add(query)
        wanted = request.headers["Range"]
        self.asked.append((path, wanted))
        if path in self.redirects or path in self.statuses:
            request.send_response(302 if path in self.redirects else self.statuses[path])
            request.send_header("Location", self.redirects.get(path, ""))
            request.end_headers()
            return
        data = self.contents.get(path) or (self.folder / path).read_bytes()
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        start = start if self.knows_ranges else 0
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        cuts = self.cuts.get(path, [])
        sent = data[start:][: cuts.pop(0) if cuts else None]
        self.served[path] += len(sent)
        request.wfile.write(sent)

    def moved(self) -> int:
        """Bytes served since it was last asked."""
        found = sum(self.served.values())
        self.served.clear()
        self.asked.clear()
        return found


@cache
def parent() -> Checkpoint:
    folder = Path(HOME.name) / "elastic"
    elastic("nemotron_h").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return Checkpoint.open(folder)


@cache
def packed() -> tuple[Path, Manifest]:
    folder = Path(HOME.name) / "packed"
    return folder, pack(parent(), folder)


@pytest.fixture
def site() -> Iterator[Site]:
    running = Site(packed()[0])
    thread = threading.Thread(target=running.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PAUSE", 0.001)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def manifest_bytes() -> int:
    return (packed()[0] / "rings.json").stat().st_size


def test_the_core_moves_the_core_and_growing_moves_one_ring(site: Site, tmp_path: Path) -> None:
    folder, manifest = packed()
    get = partial(unpack, site.url, cache=tmp_path / "cache")
    get("small", tmp_path / "small")
    core = sum(path.stat().st_size for path in (folder / "core").iterdir())
    assert {path for path, _ in site.asked} == {"rings.json"} | {
        f"core/{path.name}" for path in (folder / "core").iterdir()
    }
    assert site.moved() == core + manifest_bytes()
    slice_checkpoint(parent(), tmp_path / "slice", "small")
    assert files(tmp_path / "small") == files(tmp_path / "slice")

    get("prefix", tmp_path / "prefix")  # its ring, and what the parent is
    told = [path for path in manifest.needed(1) if path.startswith("parent/")]
    ring = sum(path.stat().st_size for path in (folder / "ring-1-prefix").iterdir())
    assert site.served[RING] == (folder / RING).stat().st_size
    assert site.moved() == ring + manifest.bytes(told) + manifest_bytes()
    assert set(told) == {"parent/config.json", "parent/model.safetensors.header"}

    get("full", tmp_path / "full")
    assert not [path for path, _ in site.asked if path.startswith(("core", "ring-1"))]
    assert site.moved() <= manifest.bytes(manifest.files) - core - ring + manifest_bytes()
    assert files(tmp_path / "full") == files(parent().path)

    get("full", tmp_path / "again")
    assert site.moved() == manifest_bytes()


@pytest.fixture
def cached(site: Site, tmp_path: Path) -> Path:
    """The folder of this source in the cache, which holds the manifest only."""
    return open_packed(site.url, tmp_path / "cache").folder


def test_a_connection_that_ends_is_taken_up_where_it_was(site: Site, tmp_path: Path) -> None:
    site.cuts[RING] = [1000, 0, 500]
    unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    ranges = [wanted for path, wanted in site.asked if path == RING]
    assert ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=1500-"]
    assert site.served[RING] == (packed()[0] / RING).stat().st_size


def test_another_run_goes_on_with_what_is_there(site: Site, cached: Path, tmp_path: Path) -> None:
    site.cuts[RING] = [1000] + [0] * 9
    with pytest.raises(CheckpointError, match=f"{RING}: ended at byte 1000 of "):
        unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    partial_file = (cached / RING).with_name(".model.safetensors.partial")
    assert partial_file.stat().st_size == 1000 and not (cached / RING).exists()
    site.cuts.clear()
    site.moved()
    unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    assert site.served[RING] == (packed()[0] / RING).stat().st_size - 1000
    assert (RING, "bytes=1000-") in site.asked and not partial_file.exists()


def test_a_server_without_ranges_begins_again(site: Site, tmp_path: Path) -> None:
    site.knows_ranges = False
    site.cuts[RING] = [1000]
    unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    assert site.served[RING] == (packed()[0] / RING).stat().st_size + 1000
    slice_checkpoint(parent(), tmp_path / "slice", "prefix")
    assert files(tmp_path / "out") == files(tmp_path / "slice")


def test_other_bytes_of_the_right_size_are_refused(
    site: Site, cached: Path, tmp_path: Path
) -> None:
    data = bytearray((packed()[0] / RING).read_bytes())
    data[-1] ^= 1
    site.contents[RING] = bytes(data)
    with pytest.raises(CheckpointError, match=f"{RING}: sha256 differs from rings.json"):
        unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    assert not (tmp_path / "out").exists() and not list((cached / RING).parent.glob("*model*"))
    site.contents.clear()
    unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")


def test_more_bytes_than_told_are_not_kept(site: Site, cached: Path, tmp_path: Path) -> None:
    size = (packed()[0] / RING).stat().st_size
    site.contents[RING] = bytes(size + 10_000_000)
    with pytest.raises(CheckpointError, match=f"{RING}: has more than {size} bytes"):
        unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    kept = sum(path.stat().st_size for path in (cached / RING).parent.iterdir())
    assert kept <= size


def test_half_a_file_of_something_else_does_not_stay(
    site: Site, cached: Path, tmp_path: Path
) -> None:
    """Left by a server that lied: what is appended to it cannot come out right."""
    (cached / RING).parent.mkdir()
    (cached / RING).with_name(".model.safetensors.partial").write_bytes(b"lies" * 100)
    unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    assert [wanted for path, wanted in site.asked if path == RING] == ["bytes=400-", None]
    assert (cached / RING).read_bytes() == (packed()[0] / RING).read_bytes()


def test_a_spoilt_file_of_the_cache_is_fetched_again(
    site: Site, cached: Path, tmp_path: Path
) -> None:
    unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    site.moved()
    (cached / RING).write_bytes(bytes((cached / RING).stat().st_size))
    unpack(site.url, "prefix", tmp_path / "again", tmp_path / "cache")
    assert site.served.keys() == {"rings.json", RING}
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (503, 5)])
def test_what_is_not_there_is_said_at_once(
    status: int, tries: int, site: Site, tmp_path: Path
) -> None:
    site.statuses[RING] = status
    with pytest.raises(CheckpointError, match=f"{RING}: HTTP status {status}"):
        unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    assert [path for path, _ in site.asked].count(RING) == tries


def test_redirects_stay_on_the_web(site: Site, tmp_path: Path) -> None:
    site.redirects["rings.json"] = f"{site.url}other"
    site.contents["other"] = (packed()[0] / "rings.json").read_bytes()
    unpack(site.url, "small", tmp_path / "out", tmp_path / "cache")
    site.redirects["core/config.json"] = "file:///etc/hostname"
    with pytest.raises(CheckpointError, match="core/config.json: HTTP status 302"):
        unpack(site.url, "small", tmp_path / "none", tmp_path / "other")
    secure = urllib.request.Request("https://a/rings.json")
    moved = partial(_WebOnly().redirect_request, secure, None, 302, "", Message())
    assert moved("https://b/rings.json")
    with pytest.raises(TransportError, match="redirected to 'http://a/rings.json'"):
        moved("http://a/rings.json")


def test_a_query_goes_along_and_is_not_told(site: Site, tmp_path: Path) -> None:
    unpack(site.url + "?token=1", "small", tmp_path / "out", tmp_path / "cache")
    assert files(tmp_path / "out") == files(packed()[0] / "core")
    assert site.queries == {"token=1"}
    site.statuses[RING] = 404
    with pytest.raises(CheckpointError) as error:
        unpack(site.url + "?token=1", "full", tmp_path / "none", tmp_path / "cache")
    assert str(error.value) == f"{site.url}{RING}: HTTP status 404"


def test_two_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def get(name: str) -> None:
        try:
            unpack(site.url, "prefix", tmp_path / name, tmp_path / "cache")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=get, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert files(tmp_path / "one") == files(tmp_path / "two")
    sizes = {path: held.bytes for path, held in packed()[1].files.items() if path in site.served}
    assert {path: n for path, n in site.served.items() if path != "rings.json"} == sizes


def test_the_cache_is_a_packed_folder_too(site: Site, cached: Path, tmp_path: Path) -> None:
    unpack(site.url, "prefix", tmp_path / "out", tmp_path / "cache")
    unpack(cached, "prefix", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such file"):
        unpack(cached, "full", tmp_path / "full")


def test_a_target_that_is_there_costs_no_download(site: Site, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        unpack(site.url, "small", tmp_path / "out", tmp_path / "cache")
    assert [path for path, _ in site.asked] == ["rings.json"]


def test_any_store_that_fsspec_knows(cached: Path, tmp_path: Path) -> None:
    folder, manifest = packed()
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/packed", recursive=True)
    data = (folder / RING).read_bytes()
    (cached / RING).parent.mkdir()
    (cached / RING).with_name(".model.safetensors.partial").write_bytes(data[:1000])
    unpack("memory://bucket/packed", "full", tmp_path / "out", tmp_path / "cache")
    assert files(tmp_path / "out") == files(parent().path)
    store.rm("/bucket/packed/core/config.json")
    with pytest.raises(CheckpointError, match="core/config.json: no such file"):
        unpack("memory://bucket/packed", "small", tmp_path / "none", tmp_path / "other")


def test_a_store_whose_package_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(CheckpointError, match="s3://bucket/packed: .*s3fs"):
        unpack("s3://bucket/packed", "small", tmp_path / "out", tmp_path / "cache")
    with pytest.raises(CheckpointError, match="nothing://x: Protocol not known: nothing"):
        unpack("nothing://x", "small", tmp_path / "out", tmp_path / "cache")
    with pytest.raises(CheckpointError, match="neither a folder, nor a URL"):
        unpack(tmp_path / "nowhere", "small", tmp_path / "out", tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub client's cache as it leaves it: links into blobs; returns the blobs."""
    home = tmp_path / "hub/models--maker--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(COMMIT)
    (home / "blobs").mkdir()
    for number, path in enumerate(p for p in packed()[0].rglob("*") if p.is_file()):
        blob, link = home / f"blobs/{number}", home / "snapshots" / COMMIT
        blob.write_bytes(path.read_bytes())
        link = link / path.relative_to(packed()[0])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return home / "blobs"


@pytest.mark.parametrize("name", ["maker/tiny", "maker/tiny@main"])
def test_a_repository_of_the_hub(name: str, hub: Path, tmp_path: Path) -> None:
    unpack(name, "full", tmp_path / "out", tmp_path / "cache")
    assert files(tmp_path / "out") == files(parent().path)
    held = [p for p in (tmp_path / "cache").rglob("*.safetensors") if p.is_file()]
    assert held and all(path.stat().st_nlink == 2 for path in held)  # the hub's own copies


def test_a_spoilt_blob_of_the_hub_is_refused(hub: Path, tmp_path: Path) -> None:
    for blob in hub.iterdir():
        if blob.stat().st_size == (packed()[0] / RING).stat().st_size:
            blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(CheckpointError, match=f"maker/tiny/{RING}: sha256 differs"):
        unpack("maker/tiny", "full", tmp_path / "out", tmp_path / "cache")
    with pytest.raises(CheckpointError, match="maker/none/rings.json: "):
        unpack("maker/none", "full", tmp_path / "out", tmp_path / "cache")
