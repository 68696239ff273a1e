"""What a run needs to go on as if it had never stopped (I8): weights, moments, router, position.

States are written while training goes on, each to a folder that takes its name once it is whole;
older ones go only then. So there is a whole state at every instant, whatever happens.
"""

import errno
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_elastic.folder import read_json, replace_json
from star_elastic.train import distributed
from star_elastic.train.distributed import World

_POSITION = "position.json"


@dataclass
class Position:
    """How far a run has come. Draws of sizes are functions of `micro_batches` and the seed."""

    step: int = 0
    micro_batches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)  # place in the stage's stream


class States:
    """The folder of a run's states."""

    def __init__(self, folder: Path, here: World):
        self.folder = folder
        self.here = here
        self._saving: tuple[Future[Any], Path] | None = None

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> bool:
        """Begin to write a state; the one before is waited for, and is then the newest whole one.

        Returns:
            False if the state of this step is there already.

        Raises:
            OSError: this or the one before cannot be written (a full disk); older ones are kept.
        """
        self.wait()
        target = self.folder / f"step-{position.step:08d}"
        if target.exists():
            return False
        partial = target.with_suffix(".partial")
        failure = _begin(partial, position) if self.here.is_first else None
        if self.here.any(failure is not None):
            self._abandon(target, failure)
        self._saving = distributed.save(tensors, partial, self.here), target
        return True

    def wait(self) -> None:
        """Until what was begun is on disk under its name.

        Raises:
            OSError: it could not be written; naming the folder and the bytes there are.
        """
        if self._saving is None:
            return
        (future, target), self._saving = self._saving, None
        failure = future.exception()
        if self.here.any(failure is not None):
            self._abandon(target, failure)
        if self.here.is_first:
            target.with_suffix(".partial").rename(target)
            for older in self._whole():
                if older != target:
                    shutil.rmtree(older)
        self.here.wait()

    def load(self, tensors: Mapping[str, Tensor]) -> Position | None:
        """Restore the newest whole state into these very tensors; None if there is none.

        Raises:
            CheckpointError: it is damaged, or of a run with other tensors.
        """
        if self.here.is_first:  # what a kill left behind
            for partial in self.folder.glob("step-*.partial"):
                shutil.rmtree(partial)
        states = self._whole()
        if not states:
            return None
        with torch.no_grad():
            distributed.load(tensors, states[-1], self.here)
        return Position(**read_json(states[-1] / _POSITION))

    def _whole(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")

    def _abandon(self, target: Path, failure: BaseException | None) -> None:
        partial = target.with_suffix(".partial")
        if self.here.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        why = "another process failed" if failure is None else distributed.reason(failure)
        kept = self._whole()
        newest = kept[-1].name if kept else "none"
        raise OSError(
            errno.EIO,
            f"state not written ({why}; {free:,} bytes free); newest whole state: {newest}",
            str(target),
        )


def _begin(partial: Path, position: Position) -> OSError | None:
    """The folder of a state, with its position; what the disk has against it, if anything."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        replace_json(partial / _POSITION, asdict(position))
    except OSError as error:
        return error
    return None
