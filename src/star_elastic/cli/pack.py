"""`star-elastic pack`: an elastic checkpoint as a core and rings, for hubs and web servers."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from star_elastic.cli.moving import moving
from star_elastic.cli.table import readable


def pack(
    checkpoint: Annotated[str, typer.Argument(help="an elastic checkpoint: a folder, or a hub id")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    sizes: Annotated[
        str | None, typer.Option(help="small,medium,full: each inside the next; default: all")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    max_shard_size: Annotated[str, typer.Option(help="of a weight file: 5GB")] = "5GB",
) -> None:
    """Store the smallest size as a core, and what each larger one adds as a ring.

    Whoever unpacks a size moves the bytes of that size only; all of them together are the parent's.
    """
    from star_elastic import rings
    from star_elastic.budget import parse_bytes
    from star_elastic.checkpoint import Checkpoint

    console = Console(stderr=True)
    opened = Checkpoint.open(checkpoint)
    chain = rings.chain_of(opened, None if sizes is None else sizes.split(","))
    names = [size.name for size in chain]
    limit = parse_bytes(max_shard_size, "--max-shard-size")
    with moving(console, "packing", rings.bytes_to_read(opened, chain)) as moved:
        manifest = rings.pack(opened, out, names, overwrite, limit, moved)
    for size in manifest.sizes:
        added = readable(manifest.bytes(size.weights))
        print(f"{out / size.folder}: {added} ({size.name}, {size.total_params:,} parameters)")
    print(f"{out}: {readable(manifest.bytes(manifest.files))} in all")
