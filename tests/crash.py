"""Writers that are killed, or stopped, at a given change to the disk, and what they leave behind.

Each runs in a fork of this process, with the calls that change the disk counted. The script is a
process of its own as no thread may be there when it forks:

    python tests/crash.py slice|quantize|write SOURCE VERB...
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from watch import Child, Watch

from star_elastic.checkpoint import Checkpoint
from star_elastic.slicing import slice_checkpoint

State = dict[str, bytes]  # a folder's files
Write = Callable[[Path, bool], None]  # to a target, overwriting it or not


def state(folder: Path) -> State:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def survey(parent: Path) -> dict[str, State]:
    return {path.name: state(path) for path in parent.iterdir()}


def slicer(source: Path) -> tuple[Write, Write]:
    """Two slices: the one to test, and another that it replaces."""
    opened = Checkpoint.open(source)

    def new(target: Path, overwrite: bool) -> None:
        slice_checkpoint(opened, target, "small", overwrite=overwrite, max_shard_size=30_000)

    def old(target: Path, overwrite: bool) -> None:
        slice_checkpoint(opened, target, "prefix", overwrite=overwrite, max_shard_size=90_000)

    return new, old


def quantizer(source: Path) -> tuple[Write, Write]:
    """Two quantized checkpoints, likewise."""
    import torch

    from star_elastic.precision import format_of
    from star_elastic.quantize import make_plan, quantize_checkpoint

    torch.set_num_threads(1)
    opened = Checkpoint.open(source)

    def of(name: str, max_shard_size: int) -> Write:
        planned = make_plan(opened, format_of(name))

        def write(target: Path, overwrite: bool) -> None:
            quantize_checkpoint(planned, target, overwrite=overwrite, max_shard_size=max_shard_size)

        return write

    return of("fp8", 40_000), of("int8", 90_000)


def writer(source: Path) -> tuple[Write, Write]:
    """Two checkpoints out of memory, likewise."""
    import torch
    from models import elastic

    from star_elastic import tensors

    torch.set_num_threads(1)

    def of(seed: int, max_shard_size: int) -> Write:
        model = elastic("llama", seed)

        def write(target: Path, overwrite: bool) -> None:
            tensors.write(
                target,
                model.state,
                model.layout,
                model.space,
                source=source,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
            )

        return write

    return of(0, 60_000), of(1, 10**6)


@dataclass(frozen=True)
class Kills:
    """A writer killed at each of its changes to the disk, in a folder beside its source."""

    new: Write
    target: Path
    before: dict[str, State]  # all that stands in the parent folder
    reference: State  # what the writer writes
    exchange: bool

    def run(self, first: str = "") -> dict[str, Any]:
        """Kills from the first change of this name on, and what was wrong after them."""
        self._prepare()
        log = self._child(0, False).wait()[2]
        start = next(n for n, (call, _) in enumerate(log) if first in call)
        kills, broken = 0, []
        for stop, (call, place) in enumerate(log[start:], start + 1):
            for half in (False, True) if call == "write" else (False,):
                self._prepare()
                kills += self._child(stop, half).wait()[0] == signal.SIGKILL
                faults = [*self._left(), *self._again()]
                broken += [f"{call} {place}, half {half}: {fault}" for fault in faults]
        calls = [call for call, _ in log[start:]]
        return {"calls": calls, "kills": kills, "broken": broken}

    def _child(self, stop: int, half: bool) -> Child:
        watch = Watch(stop, half, exchange=self.exchange)
        return Child.start(lambda: self.new(self.target, True), watch)

    def _prepare(self) -> None:
        shutil.rmtree(self.target)
        if "out" in self.before:
            self.target.mkdir()
            for name, data in self.before["out"].items():
                (self.target / name).write_bytes(data)

    def _left(self) -> list[str]:
        """What is wrong in the parent folder after a kill."""
        found = survey(self.target.parent)
        hidden = {"out", ".out.partial"} if self.exchange else {"out", ".out.partial", ".out.old"}
        faults = [f"{name} is left" for name in found.keys() - self.before.keys() - hidden]
        if found["elastic"] != self.before["elastic"]:
            faults.append("the source changed")
        old = self.before.get("out")
        if not self.exchange and "out" not in found and old is not None:
            return faults + self._put_back(old)
        if found.get("out") not in (old, self.reference):
            faults.append(f"the target is neither old nor new: {sorted(found.get('out', []))}")
        return faults

    def _put_back(self, old: State) -> list[str]:
        """What is wrong when the next writer finds no target, though there was one."""
        try:
            self.new(self.target, False)
        except FileExistsError:
            return [] if state(self.target) == old else ["the target is not the old one again"]
        return ["the old target is lost"]

    def _again(self) -> list[str]:
        """What is wrong when the next writer has been."""
        self.new(self.target, True)
        whole = survey(self.target.parent) == self.before | {"out": self.reference}
        return [] if whole else ["the next writer left something else"]


def fresh(new: Write, old: Write, parent: Path) -> dict[str, Any]:
    """Killed while writing where nothing is."""
    return _kills(new, parent, exchange=True).run()


def overwrite(new: Write, old: Write, parent: Path) -> dict[str, Any]:
    """Killed while replacing an older folder."""
    old(parent / "out", False)
    return _kills(new, parent, exchange=True).run()


def two_renames(new: Write, old: Write, parent: Path) -> dict[str, Any]:
    """The same where folders cannot be exchanged, from the moment where that matters."""
    old(parent / "out", False)
    return _kills(new, parent, exchange=False).run(first="rename")


def _kills(new: Write, parent: Path, exchange: bool) -> Kills:
    before = survey(parent)
    new(parent / "out", True)
    reference = state(parent / "out")
    assert before.get("out") != reference
    return Kills(new, parent / "out", before, reference, exchange)


def locks(new: Write, old: Write, parent: Path) -> list[Any]:
    """A writer that stands still keeps others out; when it is killed, the next takes over."""
    target, said = parent / "out", []
    holder = Child.start(lambda: new(target, False), Watch(5, number=signal.SIGSTOP))
    holder.wait_stopped()
    said.append(Child.start(lambda: old(target, False), Watch()).wait()[1])
    holder.send(signal.SIGKILL)
    said.append(holder.wait()[0])
    said.append(Child.start(lambda: old(target, False), Watch()).wait()[1])
    return [*said, sorted(survey(parent))]


def cleaning(new: Write, old: Write, parent: Path) -> list[Any]:
    """A writer that stands still while it removes what it has replaced keeps others out too."""
    target = parent / "out"
    old(target, False)
    _, _, log = Child.start(lambda: new(target, True), Watch()).wait()
    removing = next(n for n, (call, _) in zip(count(1), log, strict=False) if call == "unlink")
    old(target, True)
    holder = Child.start(lambda: new(target, True), Watch(removing, number=signal.SIGSTOP))
    holder.wait_stopped()
    said = [Child.start(lambda: old(target, True), Watch()).wait()[1]]
    holder.send(signal.SIGCONT)
    said.append(holder.wait()[1])
    return [*said, sorted(survey(parent))]


def race(new: Write, old: Write, parent: Path) -> list[Any]:
    """Two writers at once, again and again: how each fared, and whether the result is whole."""
    target, rounds = parent / "out", []
    new(target, False)
    whole = state(target)
    for overwrite in [False] * 5 + [True] * 5:
        if not overwrite:
            shutil.rmtree(target)
        gate, go = os.pipe()

        def write(gate: int = gate, go: int = go, overwrite: bool = overwrite) -> None:
            os.close(go)
            os.read(gate, 1)  # ends for both at once, when the last writing end is closed
            new(target, overwrite)

        both = [Child.start(write, Watch()) for _ in range(2)]
        os.close(go)
        os.close(gate)
        errors = [child.wait()[1] for child in both]
        rounds.append([overwrite, errors, state(target) == whole, sorted(survey(parent))])
    return rounds


def main() -> None:
    """Do what the verbs say, each beside the source; print what was found as JSON."""
    kind, source, *verbs = sys.argv[1:]
    new, old = {"slice": slicer, "quantize": quantizer, "write": writer}[kind](Path(source))
    found = {}
    for verb in verbs:
        shutil.rmtree(Path(source).parent / "out", ignore_errors=True)
        found[verb] = VERBS[verb](new, old, Path(source).parent)
    print(json.dumps(found))


VERBS = {each.__name__: each for each in (fresh, overwrite, two_renames, locks, cleaning, race)}
if __name__ == "__main__":
    main()
