"""The measured pass of `star-elastic quantize`: which parts codes harm most, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from star_elastic.cli.table import readable

if TYPE_CHECKING:
    from star_elastic.quantize import Plan
    from star_elastic.quantize.sensitivity import Harm


@dataclass(frozen=True)
class Measuring:
    """What `--measure` and the flags beside it say."""

    data: Path
    records: int
    spare: float | None
    device: str


def measured(planned: "Plan", how: Measuring, console: Console) -> tuple[list[str], str]:
    """Measure and print the parts of a plan; patterns of what to keep, and words for the card."""
    from star_elastic import stock
    from star_elastic.model import load_tokenizer
    from star_elastic.quantize.sensitivity import measure, spared, told
    from star_elastic.records import read_records

    stock.quiet()
    records = read_records(how.data)[: how.records]
    tokenizer = load_tokenizer(planned.checkpoint.path)
    with console.status("quantizing every part alone"):
        harms = measure(planned, tokenizer, records, device=how.device)
    kept = [] if how.spare is None else spared(harms, planned, how.spare)
    console.print(_table(harms, kept))
    words = told(harms, kept)
    console.print(words)
    return [pattern for harm in kept for pattern in harm.part.patterns], words


def add_to_card(folder: Path, text: str) -> None:
    """Add some words to the card of a folder that we have just written."""
    from star_elastic.folder import replace_file

    path = folder / "README.md"
    if path.exists():
        replace_file(path, f"{path.read_text('utf-8')}\n{text}\n".encode())


def _table(harms: "Sequence[Harm]", kept: "Sequence[Harm]") -> Table:
    table = Table("layer", "part")
    sizes = list(harms[0].kl)
    for head in ("bytes saved", *(f"KL, {name}" for name in sizes), "KL per MiB"):
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("")
    for harm in harms:
        table.add_row(
            str(harm.part.layer),
            harm.part.kind,
            readable(harm.part.saved),
            *(f"{harm.kl[name]:.3g}" for name in sizes),
            f"{harm.per_byte * 2**20:.3g}",
            "kept" if harm in kept else "",
        )
    return table
