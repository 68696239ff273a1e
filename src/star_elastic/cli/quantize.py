"""`star-elastic quantize`: codes for numbers, once for every size."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from star_elastic.cli.measuring import Measuring, add_to_card, measured
from star_elastic.cli.moving import moving
from star_elastic.cli.table import readable

if TYPE_CHECKING:
    from star_elastic.quantize import Plan


def quantize(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint: a folder, or a hub id")],
    format_: Annotated[str, typer.Option("--format", help="fp8, nvfp4, int8 or int4")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    keep: Annotated[
        list[str] | None,
        typer.Option(help="leave as it is: '*.q_proj', or `attention`; may be repeated"),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(help="columns under a scale: of int4 (128 if not said), or of int8"),
    ] = None,
    drop: Annotated[
        bool, typer.Option("--drop", help="leave out the sizes that would cut inside a block")
    ] = False,
    measure: Annotated[
        Path | None,
        typer.Option(help="records (JSONL): quantize every part alone first, print what it harms"),
    ] = None,
    measure_records: Annotated[int, typer.Option(min=1, help="use the first N of them")] = 32,
    spare: Annotated[
        float | None,
        typer.Option(help="keep what harms most per byte, in a share of more bytes: 0.05"),
    ] = None,
    device: Annotated[str, typer.Option(help="that measures: cpu or cuda")] = "cpu",
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    max_shard_size: Annotated[str, typer.Option(help="of a weight file: 5GB")] = "5GB",
    check_digests: Annotated[
        bool, typer.Option(help="read the whole parent first, against its digests")
    ] = False,
) -> None:
    """Quantize a checkpoint once; every size cut from it is quantized already.

    Gates, norms, convolutions, Mamba's own parameters, embeddings and lm_head stay as they are.
    With --measure and --spare so do the parts whose codes harm most for the bytes they save.
    """
    import torch

    from star_elastic.budget import parse_shard_size
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.precision import format_of
    from star_elastic.quantize import bytes_to_read, make_plan, quantize_checkpoint

    console = Console(stderr=True)
    if spare is not None and measure is None:
        raise ValueError(f"--spare {spare}: what harms most is measured, on --measure DATA")
    form = format_of(format_, group)
    shard = parse_shard_size(max_shard_size)
    opened = Checkpoint.open(checkpoint, check_digests)
    planned, words = make_plan(opened, form, keep or []), None
    if measure is not None:
        how = Measuring(measure, measure_records, spare, device)
        more, words = measured(planned, how, console)
        planned = make_plan(opened, form, [*(keep or []), *more])
    torch.set_num_threads(1)  # blocks are small: threads would mostly wait for one another
    _print_sizes(planned, drop, console)
    with moving(console, "quantizing", bytes_to_read(planned)) as progress:
        quantize_checkpoint(planned, out, drop, overwrite, shard, progress)
    if words is not None:
        add_to_card(out, words)
    share = planned.bytes / opened.disk_bytes()
    print(
        f"{out}: {len(planned.chosen)} of {len(planned.tensors)} tensors in {form.name}, "
        f"{readable(planned.bytes)}, {share:.3f} of the parent's"
    )


def _print_sizes(planned: "Plan", drop: bool, console: Console) -> None:
    """Which sizes survive: every cut falls between blocks."""
    from star_elastic.quantize import broken

    for size in planned.checkpoint.space.submodels:
        if reason := broken(planned, size.config):
            verdict = "dropped" if drop else "does not survive"
            console.print(f"[red]{size.name}: {verdict}: {reason}[/red]", soft_wrap=True)
        else:
            console.print(f"{size.name}: survives")
