"""Claims: a slice costs less than copying its parent, in 256 MiB; several sizes cost one reading.

python -m bench.slice SCRATCH [--runs 5] [--by-hand]     a parent of 8.8 GiB
python -m bench.slice SCRATCH --sparse                   60 GB under a memory limit of 512 MiB
python -m bench.slice SCRATCH --logits                   the 12B's widths in stock transformers

Every run starts with a cold page cache where the caches may be dropped (root on Linux); runs of
different kinds take turns.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.nano import PATTERN, write_parent

ROWS = ["--set", "n_routed_experts=64"]
SMALL = ["--size", "small"]
_PATTERN = "MEME*EM"  # of the layers: 8.8 GiB
_LIMIT = 512 * 2**20
_CHILD = """
import json, sys, time
def told(path):
    return dict(line.split(":") for line in open(path).read().splitlines() if ":" in line)
start = time.perf_counter()
from star_elastic.cli import _spare_torch, main
_spare_torch()
from star_elastic import align, budget, slicing  # else their own bytes would count as read
import huggingface_hub, numpy, rich.progress
before = told("/proc/self/io")
out, sys.stdout = sys.stdout, sys.stderr
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
after = told("/proc/self/io")
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_mib": int(told("/proc/self/status")["VmHWM"].split()[0]) / 1024,
    "read": int(after["rchar"]) - int(before["rchar"]),
    "written": int(after["wchar"]) - int(before["wchar"]),
}), file=out)
"""
_BY_HAND = """
import json, sys, time
from pathlib import Path
start = time.perf_counter()
from safetensors.torch import load_file, save_file
from star_elastic.checkpoint import Checkpoint
from star_elastic.shapes import narrow
source, out = map(Path, sys.argv[1:])
opened = Checkpoint.open(source, check_digests=False)
child = opened.layout.sizes_of(opened.size("small").config)
tensors = {}
for path in sorted(source.glob("*.safetensors")):
    tensors |= load_file(path)
cut = {
    name: narrow(tensors[w.name], w.cuts(opened.layout.sizes, child)).contiguous()
    for name, w in opened.layout.kept(child, opened.weights)
}
out.mkdir()
save_file(cut, out / "model.safetensors")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": int(peak.split()[1]) / 1024}))
"""


def cut(parent: Path, out: Path, words: list[str], group: Path | None = None) -> dict[str, Any]:
    """Run the verb in a process of its own, synced at the end; seconds, peak MiB, bytes moved."""
    # the process joins the group itself, so that it is limited from its first instruction
    joins = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n" if group else ""
    words = ["slice", str(parent), "--out", str(out), *words]
    return _told([sys.executable, "-c", joins + _CHILD, *words])


def copy(source: Path, target: Path) -> dict[str, Any]:
    """`cp -r`, synced."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir(), target], check=True)
    return {"seconds": time.perf_counter() - start}


def by_hand(parent: Path, out: Path) -> dict[str, Any]:
    """What one does without a tool: load all, cut, save."""
    found = _told([sys.executable, "-c", _BY_HAND, str(parent), str(out)])
    start = time.perf_counter()
    subprocess.run(["sync", *out.iterdir(), out], check=True)
    return found | {"seconds": found["seconds"] + time.perf_counter() - start}


def compare(scratch: Path, runs: int, hand: bool) -> dict[str, Any]:
    """Medians of interleaved runs, and the ratios that the claims are about."""
    parent, kept = scratch / "parent", scratch / "rows"
    if not parent.exists():
        write_parent(parent, _PATTERN)
    cut(parent, kept, [*ROWS, "--overwrite"])
    kinds: dict[str, Callable[[Path], dict[str, Any]]] = {
        "cp parent": lambda out: copy(parent, out),
        "slice small": lambda out: cut(parent, out, SMALL),
        "cp rows": lambda out: copy(kept, out),
        "slice rows": lambda out: cut(parent, out, ROWS),
        "three sizes": lambda out: cut(parent, out / "{size}", ["--size", "all"]),
    }
    if hand:
        kinds["small by hand"] = lambda out: by_hand(parent, out)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, run in kinds.items():
            shutil.rmtree(scratch / "out", ignore_errors=True)
            _cool()
            found[kind].append(run(scratch / "out"))
            print(kind, json.dumps(found[kind][-1]), file=sys.stderr, flush=True)
    shutil.rmtree(scratch / "out")
    middle = {kind: _median(figures) for kind, figures in found.items()}
    seconds = {kind: each["seconds"] for kind, each in middle.items()}
    return {
        "parent_bytes": _bytes(parent),
        "rows_bytes": _bytes(kept),
        "small_over_cp_parent": seconds["slice small"] / seconds["cp parent"],
        "rows_over_cp_written": seconds["slice rows"] / seconds["cp rows"],
        "three_sizes_read_over_parent": middle["three sizes"]["read"] / _bytes(parent),
        "medians": middle,
        "runs": found,
    }


def limited(scratch: Path) -> dict[str, Any]:
    """Cut the 12B-shaped size out of a sparse 60 GB parent, in a group limited to 512 MiB."""
    parent = scratch / "sparse"
    if not parent.exists():
        write_parent(parent, PATTERN, sparse=True)
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    group = (root / "memory" if version_1 else root) / "star-elastic-bench"
    group.mkdir()
    try:
        limit = "memory.limit_in_bytes" if version_1 else "memory.max"
        (group / limit).write_text(str(_LIMIT))
        shutil.rmtree(scratch / "out", ignore_errors=True)
        _cool()
        found = cut(parent, scratch / "out", SMALL, group)
        peak = group / ("memory.max_usage_in_bytes" if version_1 else "memory.peak")
        found["group_peak_mib"] = int(peak.read_text()) / 2**20  # with the page cache
    finally:
        group.rmdir()
    return found | {"parent_bytes": _bytes(parent), "slice_bytes": _bytes(scratch / "out")}


def logits(scratch: Path) -> dict[str, Any]:
    """Three layers at the 12B's widths, loaded by stock transformers, against the parent's view."""
    import torch
    from transformers import AutoModelForCausalLM

    from star_elastic.model import ElasticModel

    parent, out = scratch / "shallow", scratch / "out"
    if not parent.exists():
        write_parent(parent, "M*E")
    shutil.rmtree(out, ignore_errors=True)
    cut(parent, out, SMALL)
    ids = torch.arange(64)[None] * 997 % 131072
    with torch.no_grad():
        loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        sliced = loaded[0].eval()(ids).logits
        del loaded
        view = ElasticModel.from_pretrained(parent, check_digests=False)["small"](ids).logits
    difference = (sliced - view).abs().max().item()
    return {"largest_logit": view.abs().max().item(), "largest_difference": difference}


def _told(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def _cool() -> None:
    os.sync()
    caches = Path("/proc/sys/vm/drop_caches")
    if os.access(caches, os.W_OK):
        caches.write_text("3")


def _median(figures: list[dict[str, Any]]) -> dict[str, float]:
    return {key: median(each[key] for each in figures) for key in figures[0]}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path, help="a folder with 30 GB (sparse: 25 GB) to spare")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--by-hand", action="store_true")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--logits", action="store_true")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.sparse:
        found = limited(arguments.scratch)
    elif arguments.logits:
        found = logits(arguments.scratch)
    else:
        found = compare(arguments.scratch, arguments.runs, arguments.by_hand)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
