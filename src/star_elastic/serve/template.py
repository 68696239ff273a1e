"""The operator's chat template, rendered where it can do no harm.

A template is a program that comes with a checkpoint, and clients choose its input. It never runs
in this process: a few small ones (`rendering.py`) render for all requests, within budgets of time,
memory and text that the kernel enforces. One that exceeds them dies, and the next takes its place.
"""

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from star_elastic.folder import one_line

_PROGRAM = Path(__file__).with_name("rendering.py")
_MEMORY = 512 * 2**20  # bytes that a rendering may take, besides the interpreter's own
_OUT_OF_MEMORY, _LENGTH = 3, 8  # as in rendering.py, which is not imported here
_START_SECONDS = 60.0  # for the interpreter and jinja2 on a busy machine
_GRACE_SECONDS = 1.0  # in which the alarm of the process itself should have rung
_ESCAPED = 12  # bytes a character has at most in JSON: two halves, each as \uXXXX
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "TZ", "LANG", "LC_ALL")  # no tokens, no keys
_REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing by three names


class TemplateFailed(ValueError):
    """The template cannot be used, or refuses these messages: one line that says why."""


class ChatTemplate:
    """A chat template, ready to render; `close` it in the end."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str],
        max_seconds: float = 1.0,
        max_characters: int = 4 * 2**20,
        processes: int = 2,
    ) -> None:
        """Starts a process and has it compile the template: about 0.2 s.

        Args:
            source: the template, of the checkpoint's tokenizer; never of a client.
            tokens: the special tokens it may use, by name ("bos_token").
            max_seconds: of one rendering.
            max_characters: of what it renders.
            processes: renderings at a time, so that a slow one does not hold up the next.

        Raises:
            TemplateFailed: no template, naming the line; or it cannot be compiled within the time.
        """
        self._start = {
            "source": source,
            "memory": _MEMORY,
            "seconds": max_seconds,
            "characters": max_characters,
        }
        self._tokens = dict(tokens)
        first = _Renderer(self._start)
        self._idle: queue.LifoQueue[_Renderer | None] = queue.LifoQueue()
        for each in (*[None] * (processes - 1), first):
            self._idle.put(each)
        # threads, as a request that is cancelled must not leave half a frame in the socket
        self._threads = ThreadPoolExecutor(processes, "chat-template")

    @classmethod
    def of(cls, tokenizer: Any, **budgets: Any) -> "ChatTemplate | None":
        """The template of a transformers tokenizer; None if it has none.

        Raises:
            TemplateFailed: several templates and none called default; see `__init__`.
        """
        source = tokenizer.chat_template
        if source is None:
            return None
        if isinstance(source, list):  # as older tokenizer_config.json have it
            source = {each["name"]: each["template"] for each in source}
        if isinstance(source, Mapping):
            if "default" not in source:
                names = ", ".join(source)
                raise TemplateFailed(f"chat template: none is called default, there are: {names}")
            source = source["default"]
        return cls(source, tokenizer.special_tokens_map, **budgets)

    async def render(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The prompt, as `tokenizer.apply_chat_template` would make it.

        Args:
            messages: of JSON values only, as a request has them.
            arguments: what the template takes besides (`enable_thinking`, `tools`, ...). Unless it
                is said here, the prompt ends where the answer begins (`add_generation_prompt`).

        Raises:
            TemplateFailed: no message, the template refuses them, or a budget is exceeded.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._rendered, messages, arguments)

    def close(self) -> None:
        """End the processes, after what they render now; what waits is cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            if renderer := self._idle.get():
                renderer.end()

    def _rendered(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        if not messages:
            raise TemplateFailed("chat template: no messages")
        values = {
            "messages": [_as_stock(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
            **arguments,
        }
        renderer = self._idle.get()
        try:
            if renderer is None or not renderer.lives():
                renderer = _Renderer(self._start)
            return renderer.ask(values)
        finally:
            self._idle.put(renderer if renderer and renderer.lives() else None)


class _Renderer:
    """One process that renders, one request after the other."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        """Raises: TemplateFailed: the template does not compile."""
        self._seconds, self._most = start["seconds"], start["characters"]
        self._socket, theirs = socket.socketpair()
        with theirs:
            # -P: this folder has modules named like others'
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
                cwd="/",
            )
        try:
            self._exchange(start, _START_SECONDS)
        except TemplateFailed:
            self.end()
            raise

    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, values: Mapping[str, Any]) -> str:
        """Raises: TemplateFailed: as it says; the process may be dead then, see `lives`."""
        return self._exchange(values, 0.0)

    def end(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _exchange(self, message: Mapping[str, Any], more_seconds: float) -> str:
        frame = json.dumps(message).encode()
        deadline = time.monotonic() + self._seconds + _GRACE_SECONDS + more_seconds
        try:
            self._socket.settimeout(deadline - time.monotonic())
            self._socket.sendall(len(frame).to_bytes(_LENGTH) + frame)
            size = int.from_bytes(self._receive(_LENGTH, deadline))
            if size > self._most * _ESCAPED + 4096:
                raise OSError("a frame that long cannot be")
            reply = json.loads(self._receive(size, deadline))
        except (OSError, EOFError) as error:
            raise TemplateFailed(f"chat template: {self._cause(error)}") from None
        if "error" in reply:
            raise TemplateFailed(f"chat template: {one_line(ValueError(reply['error']))}")
        return reply["text"]

    def _receive(self, size: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            piece = self._socket.recv(min(size - len(received), 2**20))
            if not piece:
                raise EOFError
            received += piece
        return bytes(received)

    def _cause(self, error: Exception) -> str:
        """Why there is no answer; the process is gone afterwards."""
        if not isinstance(error, TimeoutError):  # it is dying, of a reason of its own
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        self.end()
        status = self._process.returncode
        if isinstance(error, TimeoutError) or status == -signal.SIGALRM:
            return f"took longer than {self._seconds:g} s"
        if status == _OUT_OF_MEMORY:
            return f"needs more than {_MEMORY >> 20} MiB"
        return f"its process ended with status {status}"


def _as_stock(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers hands a message to a template: without nulls, reasoning by all its names."""
    said = {name: value for name, value in message.items() if value is not None}
    reasoning = next((said[name] for name in _REASONING if name in said), None)
    if reasoning is None:
        return said
    return {"thinking": reasoning, **said, "reasoning_content": reasoning}
