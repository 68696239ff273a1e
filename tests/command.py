"""`star-elastic` in processes of their own, as a user has it, at a tenth of the time.

Most of a command's time would be importing torch and transformers, so a process is forked from one
that has imported them and done nothing else. Verbs that promise to do without torch get a whole
interpreter.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

from star_elastic.cli import main, needs_torch

_PRELOADED = ["star_elastic.train.run", "star_elastic.cli"]


class Command:
    """`star-elastic WORDS`, begun; a forked `subprocess.Popen`, with nothing on its stdin."""

    def __init__(self, *words: object, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: what differs from ours."""
        self._said = tempfile.TemporaryDirectory(prefix="command-")
        files = [str(Path(self._said.name, name)) for name in ("stdout", "stderr")]
        self._files = [Path(file) for file in files]
        told = (list(map(str, words)), files, dict(environment or {}))
        self._process = _context().Process(target=_run, args=told, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that killed it."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None and self._process.pid:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, seconds: float = 240) -> int:
        """Its exit code.

        Raises:
            TimeoutError: it goes on; it is killed.
        """
        self._process.join(seconds)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"not done within {seconds} s")
        return self.returncode

    def communicate(self, seconds: float = 240) -> tuple[str, str]:
        """What it wrote, to stdout and to stderr, once it has ended.

        Raises:
            TimeoutError: as `wait`.
        """
        self.wait(seconds)
        stdout, stderr = (file.read_text() if file.exists() else "" for file in self._files)
        return stdout, stderr


def cli(*words: object, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run `star-elastic` to its end."""
    said = list(map(str, words))
    if needs_torch(said):
        begun = Command(*said)
        stdout, stderr = begun.communicate()
        done = subprocess.CompletedProcess(said, begun.wait(), stdout, stderr)
    else:
        command = [sys.executable, "-m", "star_elastic", *said]
        done = subprocess.run(command, capture_output=True, text=True, input="", timeout=240)
    assert not check or done.returncode == 0, done.stderr
    return done


@cache
def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run(words: list[str], files: list[str], environment: dict[str, str]) -> None:
    """In the new process."""
    os.environ.update(environment)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["star-elastic", *words]
    main()
