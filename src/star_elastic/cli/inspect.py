"""`star-elastic inspect`: what a checkpoint holds, without loading its weights."""

from typing import Annotated

import typer
from rich.console import Console

from star_elastic.cli.table import print_sizes, readable, size_rows


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="a folder, or a hub id")],
    json: Annotated[bool, typer.Option("--json", help="a list of objects, one a size")] = False,
) -> None:
    """Print every size: parameters, bytes, cache per token, measured quality, trained or not."""
    from star_elastic import card
    from star_elastic.checkpoint import Checkpoint

    opened = Checkpoint.open(checkpoint, check_digests=False)  # `verify` reads all the bytes
    rows = size_rows(opened)
    print_sizes(rows, json)
    if json:
        return
    console = Console()
    axes = ", ".join(f"{field} {axis.choices}" for field, axis in opened.space.axes.items())
    if opened.is_elastic:
        console.print(f"axes: {axes or 'none'}", highlight=False)
        together = readable(opened.resident_bytes())
        console.print(f"all sizes together, as views of the one parent: {together}")
    else:
        console.print("an ordinary model folder: it declares no sizes")
    for size in opened.space.submodels:
        if warning := card.warning(size, opened.space):
            console.print(f"[red]{size.name}: {warning}[/red]")
