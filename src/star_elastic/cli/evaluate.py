"""`star-elastic evaluate`: how good every size is."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from star_elastic.cli.table import print_sizes, size_rows


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="a folder, or a hub id")],
    data: Annotated[Path, typer.Option(help="held-out records, JSONL")],
    limit: Annotated[int | None, typer.Option(help="use the first N records")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="per answer")] = 128,
    nll_only: Annotated[bool, typer.Option(help="measure the loss, generate nothing")] = False,
    write: Annotated[bool, typer.Option(help="store the figures in the checkpoint")] = False,
    json: Annotated[bool, typer.Option("--json", help="a list of objects, one a size")] = False,
) -> None:
    """Held-out loss and greedy accuracy of every size, measured in one go on views."""
    from star_elastic import evaluate as evaluation
    from star_elastic import stock
    from star_elastic.checkpoint import Checkpoint, declare
    from star_elastic.model import ElasticModel
    from star_elastic.records import read_records

    stock.quiet()
    console = Console(stderr=True)
    model = ElasticModel.from_pretrained(checkpoint)
    if model.tokenizer is None:
        raise ValueError(f"{checkpoint}: no tokenizer_config.json; evaluate needs a tokenizer")
    measured = evaluation.evaluate(
        model,
        read_records(data)[:limit],
        max_new_tokens=max_new_tokens,
        generate=not nll_only,
        on_size=lambda name, _: console.print(f"measured {name}"),
    )
    space = evaluation.with_quality(model.space, measured)
    opened = Checkpoint.open(checkpoint, check_digests=False)
    if write:
        declare(opened, space)
    rows = size_rows(opened)
    print_sizes([{**row, "quality": measured[row["name"]]} for row in rows], json)
