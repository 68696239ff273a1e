"""`star-elastic chat`: talk to a checkpoint or a server, changing its size in mid-conversation."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

if TYPE_CHECKING:
    from star_elastic.cli.talk import Account, Partner
    from star_elastic.serve.text import Parts

_AUTO = "auto"  # no size's name: the server's policy chooses
_HELP = """\
/size NAME  another size from here on{auto}
/sizes      the sizes there are
/quit       the end, as Ctrl-D; Ctrl-C ends an answer
anything else is said to the model"""


def chat(
    where: Annotated[str, typer.Argument(help="a folder, a hub id, or a server's http://...")],
    size: Annotated[str | None, typer.Option(help="the size to begin with")] = None,
    bits: Annotated[
        int | None, typer.Option(help="read codes of eight bits in groups at fewer: 2 to 8")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="per answer; 256, or what the server allows")
    ] = None,
) -> None:
    """Ask and answer; `/size NAME` changes the size, `/sizes` lists them, `/quit` ends.

    A server's API key is read from STAR_ELASTIC_API_KEY.
    """
    partner = _partner(where, bits, max_new_tokens)
    try:
        _Conversation(partner, size).hold()
    finally:
        partner.close()


def _partner(where: str, bits: int | None, max_tokens: int | None) -> "Partner":
    if where.startswith(("http://", "https://")):
        if bits is not None:
            raise ValueError(f"--bits {bits}: the server has chosen already")
        from star_elastic.cli.talk import OfServer

        return OfServer(where, max_tokens)
    from star_elastic import stock
    from star_elastic.cli.talk_here import OfCheckpoint

    stock.quiet()
    return OfCheckpoint(where, bits, max_tokens)


class _Conversation:
    """The turns so far, and the size that answers next."""

    def __init__(self, partner: "Partner", size: str | None) -> None:
        """Raises: ValueError: no such size."""
        self._partner, self._console = partner, Console(highlight=False)
        self._messages: list[dict[str, str]] = []
        names = self._names()
        if size is not None and size not in names:
            raise ValueError(f"--size {size}: there are {', '.join(names)}")
        self._size = size or (_AUTO if partner.chooses else names[0])

    def hold(self) -> None:
        """Until the user ends it."""
        while True:
            try:
                text = self._console.input(f"[bold]{escape(self._size)}>[/bold] ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if text == "/quit":
                return
            try:
                self._obey(text)
            except ValueError as error:
                self._console.print(Text(f"error: {error}", "red"))

    def _obey(self, text: str) -> None:
        match text.split():
            case []:
                return
            case ["/help"]:
                auto = f", or {_AUTO}: the server chooses" if self._partner.chooses else ""
                self._console.print(_HELP.format(auto=auto), markup=False)
            case ["/sizes"]:
                self._console.print(", ".join(self._names()), markup=False)
            case ["/size", wanted] if wanted in self._names():
                self._size = wanted
            case ["/size", *_]:
                self._console.print(f"sizes: {', '.join(self._names())}", markup=False)
            case _:
                self._talk(text)

    def _talk(self, text: str) -> None:
        """One turn. A turn that failed never was; one that was interrupted is kept so far."""
        self._messages.append({"role": "user", "content": text})
        page = _Page(self._console)
        try:
            account = self._partner.answer(self._messages, self._asked, page.hear)
        except KeyboardInterrupt:
            page.end("stopped")
        except BaseException:
            page.end()
            self._messages.pop()
            raise
        else:
            page.end(_told(account))
        if page.said:
            self._messages.append({"role": "assistant", "content": page.said})
        else:
            self._messages.pop()  # most templates want turns to alternate

    @property
    def _asked(self) -> str | None:
        return None if self._partner.chooses and self._size == _AUTO else self._size

    def _names(self) -> list[str]:
        auto = [_AUTO] if self._partner.chooses else []
        return auto + self._partner.sizes


class _Page:
    """Where an answer is written: its reasoning dim, the answer after it."""

    def __init__(self, console: Console) -> None:
        self._console, self._thought, self.said = console, False, ""
        self._open = False  # is there text on this line?

    def hear(self, parts: "Parts") -> None:
        """Write a piece."""
        if parts.reasoning:
            self._thought = True
            self._write(parts.reasoning, "dim italic")
        content = parts.content if self.said else parts.content.lstrip("\n")
        if not content:
            return
        if self._thought and not self.said:
            self.end()
        self.said += content
        self._write(content, "")

    def end(self, told: str = "") -> None:
        """Close the line, and write a dim one of what is told."""
        if self._open:
            self._console.print()
        if told:
            self._write(f"{told}\n", "dim")
        self._open = False

    def _write(self, text: str, style: str) -> None:
        from star_elastic.serve.client import printable

        self._console.print(Text(printable(text), style), end="", soft_wrap=True)
        self._open = not text.endswith("\n")


def _told(account: "Account") -> str:
    """Who answered, how much, how fast and why."""
    parts = [" → ".join(account.sizes) or "unknown size"]
    parts.append(f"{account.tokens} token{'' if account.tokens == 1 else 's'}")
    if (pace := account.tokens_per_second) is not None:
        parts.append(f"{pace:.1f} tokens/s")
    if account.cut:
        parts.append("cut: no more tokens allowed")
    if account.why:
        parts.append("; ".join(account.why))
    return " · ".join(parts)
