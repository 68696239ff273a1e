"""`star-elastic top`: what a server does now, live in the terminal."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from star_elastic.cli.table import readable

if TYPE_CHECKING:
    from star_elastic.serve.client import Client

_EVERY_S = 1.0
_DIM, _HEAD, _BAD = "dim", "bold", "red"


def top(
    url: Annotated[str, typer.Argument(help="the server")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="print it once and end")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the server's own JSON")] = False,
) -> None:
    """Show load, memory, sizes and requests of a server, until Ctrl-C; never a prompt.

    Its API key is read from STAR_ELASTIC_API_KEY.
    """
    from star_elastic.serve.client import Client

    client, console = Client(url), Console()
    try:
        if as_json:
            print(json.dumps(client.status(), indent=2))
        elif once or not console.is_terminal:
            console.print(frame(client.status()))
        else:
            _watch(client, console)
    except KeyboardInterrupt:
        return
    finally:
        client.close()


def _watch(client: "Client", console: Console) -> None:
    """Ask again and again; a server that is gone may come back."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(Padding(_now(client), (1, 2)), refresh=True)
            time.sleep(_EVERY_S)


def _now(client: "Client") -> RenderableType:
    from star_elastic.serve.client import ServerError, Unreachable

    try:
        return frame(client.status())
    except ServerError as error:
        if not isinstance(error, Unreachable) and (error.status or 0) < 500:
            raise  # asking again would not help
        return Group(Text(str(error), _BAD), Text("trying again every second; Ctrl-C ends", _DIM))


def frame(status: Mapping[str, Any]) -> RenderableType:
    """One picture of what `GET /status` tells."""
    requests = status["requests"]
    shown: list[RenderableType] = [_headline(status), _figures(status), Text()]
    shown += [_sizes(status["sizes"]), Text()]
    shown.append(_requests(requests) if requests else Text("no requests now", _DIM))
    return Group(*shown)


def _headline(status: Mapping[str, Any]) -> Text:
    state, style = ("ready", "green") if status["ready"] else ("not ready", _BAD)
    if status["draining"]:
        state, style = "draining: it takes no more requests", "yellow"
    line = Text.assemble((_plain(status["model"]), _HEAD), "  ", (state, style))
    return line.append(f"  up {_duration(status['seconds_up'])}", _DIM)


def _figures(status: Mapping[str, Any]) -> Text:
    """Load and memory, a line each."""
    load, memory = status["load"], status["memory"]
    parts = [
        f"{load['running']} running",
        f"{load['queued']} queued",
        f"{load['tokens_per_second']:,.0f} tokens/s",
        f"cache {load['cache_used']:.0%} used",
    ]
    if load.get("device_used") is not None:
        parts.append(f"device {load['device_used']:.0%} used")
    bytes_ = [
        f"{name} {readable(memory[name])}"
        for name in ("weights", "copies", "cache", "process")
        if memory.get(name)
    ]
    line = Text.assemble(("load    ", _DIM), "   ".join(parts), "\n")
    return line.append("memory  ", _DIM).append("   ".join(bytes_))


def _sizes(sizes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("size", "active", "live", "tokens", "ms/token", "")
    for size in sizes:
        pace = size["time_per_token_ms"]
        table.add_row(
            Text(_plain(size["name"]), _HEAD),
            _short(size["active_params"]),
            str(size["requests"]),
            f"{size['tokens']:,}",
            Text("-", _DIM) if pace is None else f"{pace:.2f}",
            Text("ready", "green") if size["ready"] else Text("not ready", _BAD),
        )
    return table


def _requests(requests: Sequence[Mapping[str, Any]]) -> Table:
    """Those that run or wait now, oldest first."""
    table = _table("size", "phase", "prompt", "tokens", "seconds", "why")
    for each in requests:
        answering = each["phase"] == "answering"
        table.add_row(
            Text(" → ".join(map(_plain, each["sizes"])) or _plain(each["size"]), _HEAD),
            Text(_plain(each["phase"]), "" if answering else _DIM),
            f"{each['prompt_tokens']:,}",
            f"{each['tokens']:,}/{each['max_tokens']:,}",
            f"{each['seconds']:.1f}",
            Text(_plain("; ".join(each["why"])), _DIM),
        )
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=_DIM, pad_edge=False)
    words = {"size", "", "phase", "why"}
    for head in heads:
        side = "left" if head in words else "right"
        table.add_column(head, justify=side, overflow="fold")
    return table


def _plain(text: object) -> str:
    """What a client may have had a say in, in one line that steers nothing."""
    from star_elastic.serve.client import printable

    return " ".join(printable(str(text)).split())


def _short(count: float) -> str:
    """A count of parameters: 12.3B."""
    for unit in ("", "K", "M", "B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def _duration(seconds: float) -> str:
    """Two units at most: 3 h 20 min."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
