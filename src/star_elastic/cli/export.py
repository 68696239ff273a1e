"""`star-elastic export`: one size in another engine's format."""

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from star_elastic.cli import choose
from star_elastic.cli.moving import moving
from star_elastic.cli.table import readable

if TYPE_CHECKING:
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.submodel import Submodel


class Target(StrEnum):
    """Formats that `--to` names."""

    GGUF = "gguf"


def export(
    checkpoint: Annotated[str, typer.Argument(help="an elastic checkpoint: a folder, or a hub id")],
    to: Annotated[Target, typer.Option(help="gguf: the file that llama.cpp runs")],
    out: Annotated[Path, typer.Option(help="the file to write")],
    size: Annotated[str | None, typer.Option(help="a named size")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="a config field instead: hidden_size=96")
    ] = None,
    type_: Annotated[
        str, typer.Option("--type", help="f32, f16, bf16, q8_0, mxfp4, q4_k_m, q6_k, ...")
    ] = "bf16",
    fallback: Annotated[
        bool, typer.Option("--fallback", help="other types for widths that do not fill blocks")
    ] = False,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="a file that takes and gives token ids only")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="replace the file if it exists")] = False,
    check_digests: Annotated[
        bool, typer.Option(help="read the whole parent first, against its digests")
    ] = False,
) -> None:
    """Write one size of a checkpoint as another engine's file, cut on the way.

    Types of fewer bits that only llama.cpp makes (K-quants) want llama-cpp-python installed.
    """
    from star_elastic.checkpoint import Checkpoint

    console = Console(stderr=True)
    if importlib.util.find_spec(to.value) is None:
        raise ValueError(f"--to {to.value}: pip install 'star-elastic[{to.value}]'")
    if (size is None) == (set_ is None):
        raise ValueError("export: say either --size or --set")
    opened = Checkpoint.open(checkpoint, check_digests)
    chosen = _chosen(opened, size, set_)
    _to_gguf(opened, chosen, out, type_, fallback, not no_tokenizer, overwrite, console)
    choose.warn(opened, chosen, console)


def _chosen(opened: "Checkpoint", size: str | None, fields: list[str] | None) -> "Submodel":
    from star_elastic.align import Alignment

    if size is not None:
        return opened.size(size)
    return choose.by_fields(opened, fields or [], Alignment())


def _to_gguf(
    opened: "Checkpoint",
    size: "Submodel",
    out: Path,
    kind: str,
    fallback: bool,
    with_tokenizer: bool,
    overwrite: bool,
    console: Console,
) -> None:
    from star_elastic.export.gguf import make_plan, type_of, write_gguf

    plan = make_plan(opened, size, type_of(kind), with_tokenizer, fallback)
    if not plan.vocabulary.cuts_alike:
        console.print(
            f"[yellow]tokenizer: llama.cpp's {plan.vocabulary.pre} tells capitals in ASCII only, "
            "no combining marks: words with others may get other tokens[/yellow]"
        )
    with moving(console, "exporting", plan.bytes) as progress:
        written = write_gguf(plan, out, overwrite, progress)
    codes = ", ".join(f"{count} {name}" for name, count in written.codes.items())
    print(
        f"{out}: {size.name}, {size.total_params:,} parameters, {size.active_params:,} active, "
        f"{readable(written.bytes)} ({codes})"
    )
