"""The program in which chat templates run: a process of its own, with nothing to lose.

`template.py` starts it by its path and speaks to it over one socket, its stdin and stdout: frames
of eight bytes of length and JSON. It imports jinja2 and no part of this package. Before it sees the
template it gives up opening files, writing them and starting processes, and all memory but a
budget; every job runs against an alarm whose default action, death, no code can put off. So what a
template does in C, where Python runs no handler (`9**9**9`), ends in time as well, and a template
that got out of jinja2's sandbox would stand in an empty room.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

OUT_OF_MEMORY = 3  # exit status
# what makes Python and jinja2 import modules and codecs on first use
_REHEARSAL = (
    r"{{ '\n'|wordwrap }}{{ strftime_now('%c') }}{{ [1]|pprint }}{{ [1]|random }}{{ 1 / 0 }}"
)
LENGTH = 8  # bytes before a frame that say how long it is, the highest first


class TooLong(ValueError):
    """More text than the budget."""


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """Takes no name with an underscore in front, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` and nothing else of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace: {name[:80]!r} begins with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def environment() -> ImmutableSandboxedEnvironment:
    """What chat templates may use: the same as under transformers, but for `lipsum`."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    del made.globals["lipsum"]  # opens a module on first use, and no chat needs dummy text
    return made


def rendered(template: jinja2.Template, values: Mapping[str, Any], most: int) -> str:
    """The text, of at most so many characters.

    Raises:
        TooLong: it would be longer; found before the rest is made.
    """
    pieces: list[str] = []
    left = most
    for piece in template.generate(**values):
        left -= len(piece)
        if left < 0:
            raise TooLong(f"more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    """Take the template and its budgets in a first frame, then one chat a frame, until the end."""
    _ignore_signals()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    first = _read(source)
    if first is None:
        return
    start = json.loads(first)
    with suppress(ZeroDivisionError):
        environment().from_string(_REHEARSAL).render()
    _give_up(start["memory"])
    try:
        template = _compiled(start, sink)
        while template is not None and (frame := _read(source)) is not None:
            signal.setitimer(signal.ITIMER_REAL, start["seconds"])
            reply = _reply(template, json.loads(frame), start["characters"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(sink, reply)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _compiled(start: Mapping[str, Any], sink: BinaryIO) -> jinja2.Template | None:
    """None, and said so, if the source is no template. jinja2 computes constants here already."""
    signal.setitimer(signal.ITIMER_REAL, start["seconds"])
    try:
        template, reply = environment().from_string(start["source"]), {"text": ""}
    except MemoryError:
        raise
    except Exception as error:  # whatever the source provoked
        template, reply = None, {"error": _told(error)}
    signal.setitimer(signal.ITIMER_REAL, 0)
    _write(sink, reply)
    return template


def _reply(template: jinja2.Template, values: Mapping[str, Any], most: int) -> dict[str, str]:
    try:
        return {"text": rendered(template, values, most)}
    except MemoryError:
        raise
    except Exception as error:  # whatever the template provoked
        return {"error": _told(error)}


def _told(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {str(error.message)[:300]}"
    said = str(error)[:300]
    if isinstance(error, jinja2.TemplateError | TooLong) and said:
        return said
    return f"{type(error).__name__}: {said}"


def _ignore_signals() -> None:
    """The parent's end of the socket ends us, not a Ctrl+C for its whole group: it may drain."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _give_up(memory: int) -> None:
    """No files, no processes, no cores, and so many bytes more than we have now."""
    with open("/proc/self/statm") as file:
        space = int(file.read().split()[0]) * resource.getpagesize() + memory
    limits = {
        resource.RLIMIT_AS: space,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
    }
    for limit, most in limits.items():
        with suppress(ValueError):  # the host's own limit is lower
            resource.setrlimit(limit, (most, most))


def _read(source: BinaryIO) -> bytes | None:
    """The next frame; None at the end, also in the middle of one: the parent died."""
    size = int.from_bytes(head) if len(head := source.read(LENGTH)) == LENGTH else 0
    frame = source.read(size)
    return frame if size and len(frame) == size else None


def _write(sink: BinaryIO, reply: Mapping[str, str]) -> None:
    frame = json.dumps(reply).encode()
    sink.write(len(frame).to_bytes(LENGTH))
    sink.write(frame)
    sink.flush()


if __name__ == "__main__":
    main()
