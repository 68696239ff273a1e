"""`star-elastic unpack`: one size out of a core and rings, from here or from elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from star_elastic.cli.moving import moving


def unpack(
    source: Annotated[
        str, typer.Argument(help="a packed folder, its URL (https://, s3://), or a hub id")
    ],
    size: Annotated[str, typer.Option(help="the size's name")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    cache: Annotated[
        Path | None, typer.Option(help="where fetched files stay, for larger sizes later")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    max_shard_size: Annotated[str, typer.Option(help="of a weight file: 5GB")] = "5GB",
) -> None:
    """Write a size's ordinary folder; of a remote source, fetch only what is not in the cache.

    The largest size is the elastic checkpoint itself, byte for byte.
    """
    from star_elastic import rings
    from star_elastic.budget import parse_bytes

    console = Console(stderr=True)
    packed = rings.open_packed(source, cache)
    number = rings.number_of(packed, size)
    needed = packed.manifest.needed(number)
    fetched = packed.manifest.bytes(packed.missing(needed))
    limit = parse_bytes(max_shard_size, "--max-shard-size")
    with moving(console, "unpacking", 2 * packed.manifest.bytes(needed)) as moved:
        rings.unpack_from(packed, number, out, overwrite, limit, moved)
    print(f"{out}: size {size}, {fetched:,} bytes fetched")
