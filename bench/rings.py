"""Claims: rings cost no more bytes than their parent, a size moves only its own, nothing is lost.

python -m bench.rings SCRATCH     a parent with Nemotron 3 Nano's shapes (8.8 GiB), served by HTTP
"""

import argparse
import json
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench.nano import SIZES, write_parent
from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import digest
from star_elastic.rings import pack, unpack

_PATTERN = "MEME*EM"


class _Counting(SimpleHTTPRequestHandler):
    """A plain file server that knows how many bytes it sent of each file."""

    sent: dict[str, int]

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file in blocks."""
        while data := source.read(2**20):
            outputfile.write(data)
            self.sent[self.path] = self.sent.get(self.path, 0) + len(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def measure(scratch: Path) -> dict[str, Any]:
    """Pack, serve, fetch one size after another, rebuild the parent; bytes and seconds of each."""
    parent, rings = scratch / "parent", scratch / "rings"
    if not parent.exists():
        write_parent(parent, _PATTERN)
    found: dict[str, Any] = {"parent_bytes": _bytes(parent)}
    start = time.perf_counter()
    pack(Checkpoint.open(parent), rings, overwrite=True)
    found["pack_seconds"] = time.perf_counter() - start
    found["rings_over_parent"] = _bytes(rings) / found["parent_bytes"]
    handler = partial(_Counting, directory=str(rings))
    _Counting.sent = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shutil.rmtree(scratch / "cache", ignore_errors=True)
    for size in reversed(SIZES):
        before, start = sum(_Counting.sent.values()), time.perf_counter()
        url = f"http://127.0.0.1:{server.server_port}"
        unpack(url, size, scratch / "out", cache=scratch / "cache", overwrite=True)
        found[size] = {
            "moved": sum(_Counting.sent.values()) - before,
            "folder_bytes": _bytes(scratch / "out"),
            "seconds": time.perf_counter() - start,
        }
    server.shutdown()
    files = sorted(parent.glob("*.safetensors"))
    same = all(digest(file) == digest(scratch / "out" / file.name) for file in files)
    for made in ("out", "cache", "rings"):
        shutil.rmtree(scratch / made)
    return found | {"parent_rebuilt_bit_for_bit": same}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path, help="a folder with 40 GB to spare")
    print(json.dumps(measure(parser.parse_args().scratch), indent=2))


if __name__ == "__main__":
    main()
