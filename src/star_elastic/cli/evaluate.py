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
    baselines: Annotated[
        Path | None,
        typer.Option(help="the recipe: measure each size merely sorted, and trained alone, too"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override a key of that recipe")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="read codes of eight bits in groups at fewer: 2 to 8")
    ] = None,
    write: Annotated[bool, typer.Option(help="store the figures in the checkpoint")] = False,
    json: Annotated[bool, typer.Option("--json", help="a list of objects, one a size")] = False,
) -> None:
    """Held-out loss and greedy accuracy of every size, measured in one go on views.

    With --baselines each size is also measured merely sorted, and trained alone from random
    weights on as many tokens (which takes as long as that training does).
    """
    from star_elastic import evaluate as evaluation
    from star_elastic import stock
    from star_elastic.checkpoint import Checkpoint, declare
    from star_elastic.cli.progress import LiveLosses
    from star_elastic.model import ElasticModel
    from star_elastic.records import read_records
    from star_elastic.train.baselines import measure_baselines
    from star_elastic.train.recipe import load_recipe

    stock.quiet()
    console = Console(stderr=True)
    if write and bits is not None:
        raise ValueError(f"--write, --bits {bits}: a checkpoint tells the quality of all its bits")
    model = ElasticModel.from_pretrained(checkpoint, bits=bits)
    if model.tokenizer is None:
        raise ValueError(f"{checkpoint}: no tokenizer_config.json; evaluate needs a tokenizer")
    plan = None if baselines is None else load_recipe(baselines, set_ or ())
    records = read_records(data)[:limit]
    settings = {"max_new_tokens": max_new_tokens, "generate": not nll_only}
    measured = evaluation.evaluate(
        model, records, **settings, on_size=lambda name, _: console.print(f"measured {name}")
    )
    opened = Checkpoint.open(checkpoint, check_digests=False)
    if write:
        declare(opened, evaluation.with_quality(model.space, measured))
    rows = [{**row, "quality": measured[row["name"]]} for row in size_rows(opened)]
    if plan is not None:
        fields = {name: size.config for name, size in model.sizes.items()}
        live = LiveLosses(console, plan.train.steps)
        with live.progress:
            found = measure_baselines(plan, fields, records, [live], **settings)
        rows = [{**row, "baselines": found[row["name"]]} for row in rows]
    print_sizes(rows, json)
