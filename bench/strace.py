"""Forked children whose system calls `strace` sees, and meddles with."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a child ended: by which signal (0: none), with which error, after which calls."""

    signal: int
    error: str | None
    calls: list[tuple[str, str]]  # of its first thread: name, and the line of strace


class Child:
    """A fork that waits for `go`, works, and tells its error."""

    def __init__(self, work: Callable[[], None]):
        gate, self._go = os.pipe()
        self._said, say = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(gate)
            os.close(say)
            return
        select.select([gate], [], [])  # no `read`, which strace may count twice when it attaches
        error = None
        try:
            work()
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        os.writev(say, [json.dumps(error).encode()])  # `write` may be made to fail
        os._exit(0)

    def go(self) -> None:
        os.write(self._go, b".")
        os.close(self._go)

    def wait(self) -> tuple[int, str | None]:
        with os.fdopen(self._said, "rb") as file:
            text = file.read()
        status = os.waitpid(self.pid, 0)[1]
        return os.WTERMSIG(status), json.loads(text) if text else None


def traced(work: Callable[[], None], calls: Sequence[str], log: Path, *options: str) -> Outcome:
    """Do some work in a child under strace.

    Args:
        calls: the system calls to see; those that this machine does not have are passed over.
        log: a file for what strace saw.
        options: of strace: what to inject.
    """
    if shutil.which("strace") is None:
        raise SystemExit("strace is not installed; it makes the system calls fail")
    child = Child(work)
    trace = "trace=" + ",".join(f"?{name}" for name in calls)
    words = ["strace", "-f", "-y", "-s0", "-o", str(log), "-e", trace, *options]
    with subprocess.Popen([*words, "-p", str(child.pid)], stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        if b"attached" not in said:
            os.kill(child.pid, signal.SIGKILL)
            raise SystemExit(f"strace cannot attach: {said.decode().strip()}")
        child.go()
        number, error = child.wait()
        strace.stderr.read()
    lines = (re.match(rf"{child.pid} +(\w+)\((.*)", line) for line in log.open())
    return Outcome(number, error, [(m[1], m[2]) for m in lines if m])
