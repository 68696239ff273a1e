"""The calls of a process that change the disk: counted, and met with a signal."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from star_elastic.folder import atomic

CHANGES = ("mkdir", "rmdir", "unlink", "rename", "replace", "chmod", "fsync", "write", "ftruncate")


@dataclass
class Watch:
    """The changes to the disk of this process; at the `stop`-th it gets the signal `number`.

    The signal comes before the change or, of a write, when half of it is done.
    """

    stop: int = 0
    half: bool = False
    number: int = signal.SIGKILL
    exchange: bool = True  # has the system `renameat2`?
    log: list[tuple[str, str]] = field(default_factory=list)

    def install(self, put: Callable[[Any, str, Any], None] = setattr) -> None:
        for name in CHANGES:
            put(os, name, self._watched(name, getattr(os, name)))
        put(os, "open", self._creating(os.open))
        put(atomic, "_rename", self._renaming(atomic._rename))

    def _hear(self, name: str, *places: Any, dir_fd: int | None = None) -> None:
        self.log.append((name, " ".join(_place(each, dir_fd) for each in places)))
        if len(self.log) == self.stop:
            os.kill(os.getpid(), self.number)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **more: Any) -> Any:
            if name == "write" and self.half and len(self.log) + 1 == self.stop:
                call(args[0], args[1][: len(args[1]) // 2])
            places = args[: 2 if name in ("rename", "replace") else 1]
            self._hear(name, *places, dir_fd=more.get("dir_fd"))
            return call(*args, **more)

        return watched

    def _creating(self, call: Callable[..., int]) -> Callable[..., int]:
        def watched(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                self._hear("create", path)
            return call(path, flags, *more, **named)

        return watched

    def _renaming(self, call: Callable[..., bool]) -> Callable[..., bool]:
        def watched(source: Path, target: Path, flags: int) -> bool:
            if not self.exchange:
                return False
            self._hear("exchange" if flags == atomic._RENAME_EXCHANGE else "rename", source, target)
            return call(source, target, flags)

        return watched


@dataclass(frozen=True)
class Child:
    """A forked writer."""

    pid: int
    pipe: int

    @classmethod
    def start(cls, work: Callable[[], None], watch: Watch) -> "Child":
        read, write = os.pipe()
        say = os.write
        if pid := os.fork():
            os.close(write)
            return cls(pid, read)
        error = None
        try:
            watch.install()
            work()
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        say(write, json.dumps({"error": error, "log": watch.log}).encode())
        os._exit(0)

    def wait(self) -> tuple[int, str | None, list[tuple[str, str]]]:
        """The signal that killed it (or 0), its error, its changes to the disk."""
        with os.fdopen(self.pipe, "rb") as file:
            told = json.loads(file.read() or b"{}")
        status = os.waitpid(self.pid, 0)[1]
        return os.WTERMSIG(status), told.get("error"), told.get("log", [])

    def wait_stopped(self) -> None:
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


def _place(where: Any, dir_fd: int | None) -> str:
    if isinstance(where, int):
        return os.readlink(f"/proc/self/fd/{where}")
    return os.fspath(where if dir_fd is None else Path(_place(dir_fd, None)) / where)
