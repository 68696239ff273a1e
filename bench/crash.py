"""Claim: a slice that is killed, or refused by the disk, at any instant is whole or not there.

The system's own calls are met with `strace`: a slice is killed at each call that changes the disk,
then each of them fails with errors that disks have, then a larger slice is killed at random times.
After each, the target must be absent, the old folder or the new one, bit for bit; the source the
same; nothing else left but the hidden folder beside; and the next slice must put all right.

    python -m bench.crash [--kills 200] [--small] [--folder DIR]
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forks must find no other thread
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # slicing needs none

from transformers import NemotronHConfig  # noqa: E402

from bench.strace import Child, Outcome, traced  # noqa: E402
from star_elastic import configs  # noqa: E402
from star_elastic.checkpoint import Checkpoint  # noqa: E402
from star_elastic.dtypes import STORED_AS, dtype_of  # noqa: E402
from star_elastic.folder import Shards, Spec, write_json  # noqa: E402
from star_elastic.layout import Layout  # noqa: E402
from star_elastic.slicing import slice_checkpoint  # noqa: E402
from star_elastic.submodel import ElasticSpace  # noqa: E402

MOVES = ("rename", "renameat", "renameat2")
CHANGES = (*MOVES, "write", "pwrite64", "pwritev", "fsync", "fdatasync", "mkdir", "mkdirat")
CHANGES += ("unlink", "unlinkat", "rmdir", "openat", "ftruncate", "fallocate", "chmod", "fchmodat")
READS = ("read", "pread64", "preadv")
FULL = ("ENOSPC", "EDQUOT")  # once they come, they stay
ERRORS = {
    "write": (*FULL, "EIO", "EINTR"),
    "fsync": ("EIO", "ENOSPC", "EINTR"),
    "openat": ("EMFILE", "ENOSPC", "EROFS", "EINTR"),
    "mkdir": ("ENOSPC", "EROFS"),
    "renameat2": ("EIO", "ENOSPC", "ENOSYS"),
    "close": ("EIO", "EDQUOT"),
    **dict.fromkeys(READS, ("EIO", "EINTR")),
}
PASSED = ("EINTR", "ENOSYS")  # tried again, or in another way
State = dict[str, str]  # digests of a folder's files


def write_parent(folder: Path, width: int, layers: int) -> None:
    """An elastic checkpoint of random bytes, in several files, that declares two sizes."""
    config = NemotronHConfig(
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"] * layers,
        vocab_size=8 * width,
        hidden_size=width,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        mamba_num_heads=8,
        mamba_head_dim=width // 8,
        n_groups=2,
        ssm_state_size=8,
        conv_kernel=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=width,
        moe_shared_expert_intermediate_size=width,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    layout = Layout(config)
    dtype = STORED_AS[dtype_of(config)]
    specs = [Spec(name, dtype, w.shape(layout.sizes)) for name, w in layout.stored.items()]
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    with Shards(folder, specs, sum(spec.bytes for spec in specs) // 3) as shards:
        for spec in specs:
            shards.write(memoryview(noise.bytes(spec.bytes)))
    sizes = {"full": {}, "old": {"moe_intermediate_size": width // 2}}
    sizes["new"] = sizes["old"] | {"hidden_size": width * 3 // 4}
    values = configs.config_json(layout.config)
    values["elastic_config"] = ElasticSpace.of(layout, sizes, trained=True).model_dump()
    write_json(folder / "config.json", values)
    for name in ("tokenizer.json", "LICENSE"):
        write_json(folder / name, {"name": name})


class Bench:
    """One source with its target beside it, alone in a folder."""

    def __init__(self, parent: Path, width: int, layers: int):
        self.parent, self.target = parent, parent / "out"
        write_parent(parent / "elastic", width, layers)
        self.opened = Checkpoint.open(parent / "elastic")
        self.whole = {}  # both folders, as they must be
        for name in ("old", "new"):
            self.slice(name)
            self.whole[name] = state(self.target)
            self.target.rename(parent.with_name(f"{parent.name}-{name}"))
        self.source = state(parent / "elastic")
        self.problems: list[str] = []

    def slice(self, name: str = "new") -> None:
        size = self.opened.disk_bytes()
        slice_checkpoint(self.opened, self.target, name, overwrite=True, max_shard_size=size // 4)

    def prepare(self, overwrite: bool) -> State | None:
        """Put the old folder, or none, in the target's place; what stands there then."""
        shutil.rmtree(self.target, ignore_errors=True)
        if not overwrite:
            return None
        shutil.copytree(self.parent.with_name(f"{self.parent.name}-old"), self.target)
        return self.whole["old"]

    def check(self, before: State | None, where: str, hidden: bool) -> State | None:
        """Old or new, the source unchanged, nothing left; then let the next slice put it right."""
        names = {path.name for path in self.parent.iterdir()}
        found = state(self.target) if "out" in names else None
        if found not in (before, self.whole["new"]):
            self.problems.append(f"{where}: half a target")
        if names - {"out", "elastic"} - ({".out.partial"} if hidden else set()):
            self.problems.append(f"{where}: left {sorted(names)}")
        self.slice()
        names = {path.name for path in self.parent.iterdir()}
        if names != {"out", "elastic"} or state(self.target) != self.whole["new"]:
            self.problems.append(f"{where}: the next slice did not put it right")
        if state(self.parent / "elastic") != self.source:
            self.problems.append(f"{where}: the source changed")
        return found

    def points(self, overwrite: bool, place: Path) -> Iterator[tuple[str, int, str]]:
        """Calls about a place: name, number among those of its name, line of strace."""
        self.prepare(overwrite)
        dry, seen = self._traced(), Counter()
        if dry.error is not None:
            raise SystemExit(f"without any fault: {dry.error}")
        for name, line in dry.calls:
            seen[name] += 1
            if str(place) in line and not (name == "openat" and "O_CREAT" not in line):
                yield name, seen[name], line

    def kills(self, overwrite: bool) -> dict[str, Any]:
        """Killed at each change, before it is made."""
        points = [p for p in self.points(overwrite, self.parent) if p[0] in CHANGES]
        killed, first = 0, len(self.problems)
        for name, number, line in points:
            before = self.prepare(overwrite)
            outcome = self._traced("-e", f"inject={name}:signal=KILL:when={number}")
            killed += outcome.signal == signal.SIGKILL
            self.check(before, f"killed at {name}({line[:80]}", hidden=True)
        calls = dict(Counter(name for name, _, _ in points))
        broken = len(self.problems) - first
        return {"points": len(points), "calls": calls, "kills": killed, "broken": broken}

    def errors(self) -> dict[str, Any]:
        """Each change to the output, and each read of the source, refused once or from then on."""
        points = [p for p in self.points(True, self.parent) if p[0] in ERRORS]
        met, first = Counter(), len(self.problems)
        for name, number, line in points:
            if name == "close" and "/.out.partial/" not in line:
                continue  # of what was only read
            for error in ERRORS[name]:
                before = self.prepare(overwrite=True)
                when = f"{number}+" if error in FULL and name == "write" else f"{number}"
                outcome = self._traced("-e", f"inject={name}:error={error}:when={when}")
                where = f"{error} at {name}({line[:80]}"
                if outcome.signal or not outcome.error and error not in PASSED:
                    self.problems.append(f"{where}: not told: {outcome.signal}")
                if outcome.error and str(self.parent) not in outcome.error:
                    self.problems.append(f"{where}: names no path: {outcome.error}")
                if self.check(before, where, hidden=False) != self.whole["new"]:
                    met[f"{name} {error}"] += 1
                    if not outcome.error:
                        self.problems.append(f"{where}: no error and no new folder")
        told = dict(met)
        return {"errors": sum(met.values()), "told": told, "broken": len(self.problems) - first}

    def random_kills(self, kills: int) -> dict[str, Any]:
        """Killed at random times, half of them while replacing a folder."""
        draw, met, first = random.Random(0), Counter(), len(self.problems)
        seconds = min(self._seconds() for _ in range(3))
        while met["killed"] < kills:  # those that come too late do not count
            met["tried"] += 1
            before = self.prepare(overwrite=met["tried"] % 2 == 1)
            child = Child(self.slice)
            child.go()
            time.sleep(draw.uniform(0, seconds))
            os.kill(child.pid, signal.SIGKILL)
            number, _ = child.wait()
            met["killed"] += number == signal.SIGKILL
            met["half a hidden folder was left"] += (self.parent / ".out.partial").exists()
            found = self.check(before, f"random kill {met['tried']}", hidden=True)
            met["the new folder was there"] += found == self.whole["new"]
        slices = {"bytes": self.opened.disk_bytes(self._child()), "seconds": round(seconds, 3)}
        return {**slices, **met, "broken": len(self.problems) - first}

    def _traced(self, *options: str) -> Outcome:
        calls = (*CHANGES, *READS, "close")
        return traced(self.slice, calls, self.parent.with_name("strace.log"), *options)

    def _child(self) -> Any:
        return self.opened.layout.sizes_of(self.opened.size("new").config)

    def _seconds(self) -> float:
        self.prepare(overwrite=False)
        child, began = Child(self.slice), time.perf_counter()
        child.go()
        child.wait()
        return time.perf_counter() - began


def state(folder: Path) -> State:
    """Names and digests of a folder's files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def main() -> None:
    """Print the figures as JSON; exit status 1 where anything broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at random times")
    parser.add_argument("--small", action="store_true", help="a smaller model for those")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary one)")
    arguments = parser.parse_args()
    width, layers = (256, 2) if arguments.small else (512, 4)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        tiny, larger = (
            Bench(Path(folder, "tiny"), 32, 1),
            Bench(Path(folder, "larger"), width, layers),
        )
        figures = {
            "killed at each change, fresh": tiny.kills(overwrite=False),
            "killed at each change, overwriting": tiny.kills(overwrite=True),
            "refused, overwriting": tiny.errors(),
            "killed at random times": larger.random_kills(arguments.kills),
        }
    problems = tiny.problems + larger.problems
    print(json.dumps({**figures, "broken": len(problems), "problems": problems[:20]}, indent=2))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
