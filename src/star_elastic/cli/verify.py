"""`star-elastic verify`: is a checkpoint what it says?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from star_elastic.cli.moving import moving


def verify(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint: a folder, or a hub id")],
    finite: Annotated[
        bool, typer.Option("--finite", help="read all weights: no NaN, no infinity")
    ] = False,
    slice_: Annotated[
        list[Path] | None,
        typer.Option("--slice", help="a folder that should be one of its sizes, bit for bit"),
    ] = None,
) -> None:
    """Check names, shapes, dtypes, declared sizes and digests; values and slices if asked.

    Every check that passes is a line; the first that fails is the error.
    """
    from star_elastic.checkpoint import Checkpoint, check_digests_of
    from star_elastic.slicing import plan
    from star_elastic.verify import check_finite, check_slice

    console = Console(stderr=True)
    opened = Checkpoint.open(checkpoint, check_digests=False)
    weights = sum(stored.end - stored.start for stored in opened.stored.values())
    print(f"{len(opened.stored)} tensors: names, shapes and dtypes are the config's")
    for size in opened.space.submodels:  # a cut inside a block of codes would show here
        plan(opened, size)
    print(f"nested sizes: {', '.join(size.name for size in opened.space.submodels)}")
    files = opened.space.digests
    if files:
        total = sum((opened.path / file).stat().st_size for file in files)
        with moving(console, "digests", total) as progress:
            check_digests_of(opened.path, opened.space, progress)
        print(f"{len(files)} files have their digests")
    else:
        console.print("[yellow]it declares no digests: nothing vouches for its bytes[/yellow]")
    if finite:
        with moving(console, "values", weights) as progress:
            check_finite(opened, progress)
        print("all values are numbers")
    for folder in slice_ or []:
        other = Checkpoint.open(folder, check_digests=False)
        with moving(console, "comparing", weights) as progress:
            fields = check_slice(opened, other, progress)
        told = ", ".join(f"{field} = {value}" for field, value in fields.items())
        print(f"{folder}: is this checkpoint at {told or 'its full size'}, bit for bit")
