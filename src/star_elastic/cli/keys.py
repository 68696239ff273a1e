"""`star-elastic keys`: make, list and revoke the API keys of a server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from star_elastic.serve.keys import Key

File = Annotated[Path, typer.Option("--file", help="the keys, as `serve --keys` reads them")]

keys_app = typer.Typer(
    name="keys", help="Make, list and revoke the API keys of a server.", no_args_is_help=True
)


@keys_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="whose key: stands in logs and metrics")],
    file: File,
    tier: Annotated[str | None, typer.Option(help="the most quality it may have")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    budget_per_minute: Annotated[float | None, typer.Option(help="a cost")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="may use /admin")] = False,
) -> None:
    """Print a new key, once, and append its digest to the file."""
    from star_elastic.serve.keys import digest_of, new_key

    key = new_key()
    entry = {
        "name": name,
        "sha256": digest_of(key),
        "tier": tier,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "budget_per_minute": budget_per_minute,
        "admin": admin,
    }
    with _changed(file) as entries:
        entries.append(entry)
    print(key)
    typer.echo(f"{file}: {name} added; nobody can show this key again", err=True)


@keys_app.command("list")
def list_(file: File) -> None:
    """Print who has a key, and what each may do."""
    from star_elastic.serve.keys import Keys

    table = Table()
    for head in ("name", "tier", "requests/min", "tokens/min", "budget/min", "admin"):
        table.add_column(head, justify="right" if "/" in head else "left", overflow="fold")
    for key in Keys.read_any(file):
        table.add_row(*_row(key))
    Console().print(table)


@keys_app.command("remove")
def remove(name: Annotated[str, typer.Argument(help="whose key")], file: File) -> None:
    """Revoke a key; a server that runs takes note when it reads the file again."""
    with _changed(file) as entries:
        left = [entry for entry in entries if entry["name"] != name]
        if len(left) == len(entries):
            names = ", ".join(str(entry["name"]) for entry in entries)
            raise ValueError(f"{file}: no key is called {name}; there are: {names or 'none'}")
        entries[:] = left
    typer.echo(f"{file}: {name} removed", err=True)


@contextmanager
def _changed(file: Path) -> Iterator[list[dict[str, object]]]:
    """The entries, to change; the file is replaced at the end if they are good, or left as it is.

    Raises:
        KeysError: the file, or what became of it, cannot be used.
        BlockingIOError: another process is changing it.
    """
    import yaml

    from star_elastic.folder import atomic_file
    from star_elastic.serve.keys import Keys

    with atomic_file(file, overwrite=True) as partial:  # locked: nobody changes it meanwhile
        os.chmod(partial, 0o600)
        keys = Keys.read_any(file) if file.exists() else []
        entries = [key.model_dump() for key in keys]
        yield entries
        kept = [{k: v for k, v in each.items() if v not in (None, False)} for each in entries]
        partial.write_text(yaml.safe_dump(kept, sort_keys=False), "utf-8")
        try:
            Keys.read_any(partial)
        except ValueError as error:
            raise ValueError(str(error).replace(str(partial), str(file))) from None


def _row(key: "Key") -> tuple[str, ...]:
    limits = (key.requests_per_minute, key.tokens_per_minute, key.budget_per_minute)
    shown = ("-" if limit is None else f"{limit:,}" for limit in limits)
    return (key.name, key.tier or "-", *shown, "yes" if key.admin else "no")
