"""Claims: FP8 at no less than half the speed of `cp`, in 1 GiB; three sizes in one NVFP4 file of
at most 0.32 of the BF16 parent.

python -m bench.quantize SCRATCH [--pattern MEM*] [--runs 3] [--formats fp8,nvfp4]
python -m bench.quantize SCRATCH --count     the ratio by layout count alone, of all 52 layers

A parent of Nemotron 3 Nano's shapes with as many of its layers as the pattern says is written once.
Runs of different kinds take turns, each with the parent out of the page cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.nano import SIZES, nano_config, write_parent
from star_elastic.checkpoint import Checkpoint
from star_elastic.dtypes import STORED_AS, STORED_ITEMSIZE, dtype_of
from star_elastic.folder import Stored
from star_elastic.layout import Layout
from star_elastic.precision import format_of
from star_elastic.quantize import broken, make_plan
from star_elastic.submodel import ElasticSpace

FORMATS = "fp8,nvfp4,int8,int4"
_GROUP = 64  # of int4: 128 would cut inside a group at an expert width of 1856
_PATTERN = "MEM*"  # 4.3 GiB, of which 1.3 GiB are embeddings and lm_head
_CHILD = """
import json, sys, time
start = time.perf_counter()
from star_elastic.cli import main
out, sys.stdout = sys.stdout, sys.stderr
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
found = {"seconds": time.perf_counter() - start, "peak_mib": int(peak.split()[1]) / 1024}
print(json.dumps(found), file=out)
"""


def count(formats: list[str]) -> dict[str, Any]:
    """Bytes of the whole 30B's shapes, and whether its sizes survive; nothing is written."""
    layout = Layout(nano_config())
    dtype = STORED_AS[dtype_of(layout.config)]
    stored: dict[str, Stored] = {}
    for name, weight in layout.stored.items():
        shape = weight.shape(layout.sizes)
        size = STORED_ITEMSIZE[dtype]
        for width in shape:
            size *= width
        stored[name] = Stored("", dtype, shape, 0, size)
    space = ElasticSpace.of(layout, SIZES, trained=True)
    parent = Checkpoint(
        Path("nano"), layout.config, layout, space, stored, layout.stored, is_elastic=True
    )
    found = {}
    for name in formats:
        planned = make_plan(parent, format_of(name, _GROUP if name == "int4" else None))
        found[name] = {
            "bytes": planned.bytes,
            "ratio": planned.bytes / parent.disk_bytes(),
            "sizes": [size.name for size in space.submodels if not broken(planned, size.config)],
        }
    return {"parent_bytes": parent.disk_bytes(), "formats": found}


def compare(scratch: Path, pattern: str, formats: list[str], runs: int) -> dict[str, Any]:
    """Medians of interleaved runs, and the ratios that the claims are about."""
    parent, out = scratch / f"parent-{pattern.replace('*', 'A')}", scratch / "out"
    if not parent.exists():
        write_parent(parent, pattern)
    kinds = ["cp", *formats]
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind in kinds:
            shutil.rmtree(out, ignore_errors=True)
            _forget(parent)
            found[kind].append(_copy(parent, out) if kind == "cp" else _quantize(parent, out, kind))
            found[kind][-1]["bytes"] = _bytes(out)
            print(kind, json.dumps(found[kind][-1]), file=sys.stderr, flush=True)
    shutil.rmtree(out)
    middle = {
        kind: {key: median(each[key] for each in figures) for key in figures[0]}
        for kind, figures in found.items()
    }
    for each in middle.values():
        each["speed_over_cp"] = middle["cp"]["seconds"] / each["seconds"]
        each["ratio"] = each["bytes"] / _bytes(parent)
    return {"parent_bytes": _bytes(parent), "medians": middle, "runs": found}


def _quantize(parent: Path, out: Path, name: str) -> dict[str, float]:
    words = ["quantize", str(parent), "--out", str(out), "--format", name]
    words += ["--group", str(_GROUP)] if name == "int4" else []
    command = [sys.executable, "-c", _CHILD, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def _copy(parent: Path, out: Path) -> dict[str, float]:
    """`cp -r`, synced as ours is."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", parent, out], check=True)
    subprocess.run(["sync", *out.iterdir(), out], check=True)
    return {"seconds": time.perf_counter() - start}


def _forget(folder: Path) -> None:
    """Let the files leave the page cache."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--pattern", default=_PATTERN)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--count", action="store_true")
    arguments = parser.parse_args()
    formats = arguments.formats.split(",")
    if arguments.count:
        found = count(formats)
    else:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
        found = compare(arguments.scratch, arguments.pattern, formats, arguments.runs)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
