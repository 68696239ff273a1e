"""`star-elastic slice`: one size as a stock folder that loads without this package."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from star_elastic.cli.table import readable


def slice_(
    checkpoint: Annotated[str, typer.Argument(help="an elastic checkpoint: a folder, or a hub id")],
    out: Annotated[Path, typer.Option(help="the folder to write; must not exist")],
    size: Annotated[str | None, typer.Option(help="a named size; `inspect` lists them")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="a config field instead: hidden_size=96")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    max_shard_size: Annotated[int, typer.Option(help="bytes of a weight file, at most")] = 5
    * 10**9,
) -> None:
    """Cut one size out of an elastic checkpoint, with no further training."""
    from star_elastic import card, stock
    from star_elastic.budget import parse_field
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.slicing import slice_checkpoint

    stock.quiet()
    console = Console(stderr=True)
    opened = Checkpoint.open(checkpoint)
    fields = None if set_ is None else dict(parse_field(text, "--set") for text in set_)
    cut = slice_checkpoint(opened, out, size, fields, overwrite, max_shard_size)
    warning = card.warning(cut, opened.space)
    if size is None and opened.space.training is None:
        console.print("[yellow]nobody trained or measured this very size[/yellow]")
    elif warning:
        console.print(f"[red]{cut.name}: {warning}[/red]")
    written = readable(sum(path.stat().st_size for path in out.iterdir()))
    print(f"{out}: {cut.total_params:,} parameters, {written}")
