"""`star-elastic slice`: sizes as stock folders that load without this package."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from star_elastic.cli import choose
from star_elastic.cli.moving import moving
from star_elastic.cli.table import readable

if TYPE_CHECKING:
    from star_elastic.align import Alignment
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.submodel import Submodel


def slice_(
    checkpoint: Annotated[str, typer.Argument(help="an elastic checkpoint: a folder, or a hub id")],
    out: Annotated[Path, typer.Option(help="the folder to write; {size} stands for the name")],
    size: Annotated[
        list[str] | None, typer.Option(help="a named size, or `all`; may be repeated")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="a config field instead: hidden_size=96")
    ] = None,
    params: Annotated[str | None, typer.Option(help="or total parameters at most: 17B")] = None,
    active: Annotated[str | None, typer.Option(help="or parameters a token uses: 2.5B")] = None,
    memory: Annotated[str | None, typer.Option(help="or weights, cache, states: 24GiB")] = None,
    context: Annotated[str, typer.Option(help="tokens a sequence, for --memory")] = "4k",
    batch: Annotated[int, typer.Option(help="sequences at once, for --memory", min=1)] = 1,
    align: Annotated[
        str | None, typer.Option(help="widths in multiples: 16, 128, or nvfp4, mxfp4, gguf")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="ranks that share the widths out")] = 1,
    bits: Annotated[
        int | None, typer.Option(help="keep 4 of 8 bits (of `quantize --format int8 --group N`)")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    max_shard_size: Annotated[str, typer.Option(help="of a weight file: 5GB")] = "5GB",
    check_digests: Annotated[
        bool, typer.Option(help="read the whole parent first, against its digests")
    ] = False,
) -> None:
    """Cut sizes out of an elastic checkpoint, with no further training.

    Only the bytes that a size needs are read, and they go from file to file: no model is built.
    """
    from star_elastic.align import Alignment
    from star_elastic.budget import parse_shard_size
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.slicing import bytes_to_read, plan, refuse_source, write_slices

    console = Console(stderr=True)
    alignment = Alignment.parse(align, tensor_parallel)
    shard = parse_shard_size(max_shard_size)
    opened = Checkpoint.open(checkpoint, check_digests)
    budget = {"params": params, "active": active, "memory": memory}
    ways = [size, set_, *budget.values()]
    if sum(way is not None for way in ways) != 1:
        raise ValueError("slice: say one of --size, --set, --params, --active and --memory")
    if size is not None:
        cuts = _folders(opened, size, out, alignment)
    elif set_ is not None:
        cuts = {out: choose.by_fields(opened, set_, alignment)}
    else:
        cuts = {out: choose.within(opened, budget, context, batch, alignment, console)}
    refuse_source(opened, cuts)
    plans = {folder: plan(opened, each, bits) for folder, each in cuts.items()}
    with moving(console, "slicing", bytes_to_read(list(plans.values()))) as progress:
        write_slices(opened, plans, overwrite, shard, progress)
    _report(opened, cuts, console)


def _folders(
    opened: "Checkpoint", names: Sequence[str], out: Path, alignment: "Alignment"
) -> dict[Path, "Submodel"]:
    """Where each named size goes."""
    if "all" in names and "all" not in opened.space.sizes:
        names = list(opened.space.sizes)
    sizes = choose.named(opened, names, alignment)
    if len(sizes) > 1 and "{size}" not in str(out):
        raise ValueError(f"--out {out}: several sizes want a folder each, such as {out}/{{size}}")
    return {Path(str(out).replace("{size}", name)): size for name, size in sizes.items()}


def _report(opened: "Checkpoint", cuts: dict[Path, "Submodel"], console: Console) -> None:
    for folder, size in cuts.items():
        choose.warn(opened, size, console)
        written = readable(sum(path.stat().st_size for path in folder.iterdir()))
        fields = ", ".join(f"{field} = {value}" for field, value in size.config.items())
        print(f"{folder}: {size.total_params:,} parameters, {written} ({fields or 'the parent'})")
