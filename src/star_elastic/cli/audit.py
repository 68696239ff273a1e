"""`star-elastic audit`: is a checkpoint elastic at all?"""

import json as json_
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def audit(
    checkpoint: Annotated[str, typer.Argument(help="a folder, or a hub id")],
    data: Annotated[Path, typer.Option(help="held-out records, JSONL, of text the parent knows")],
    limit: Annotated[int | None, typer.Option(help="use the first N records", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="tokens of a record, at most", min=2)] = 512,
    json: Annotated[bool, typer.Option("--json", help="a list of objects, one a size")] = False,
) -> None:
    """Measure what every size keeps of what the parent knows; warn where it was never trained.

    0 % is the loss of a model that knows token frequencies and nothing else, 100 % the parent's.
    """
    from star_elastic import stock
    from star_elastic.audit import audit as measured
    from star_elastic.model import ElasticModel
    from star_elastic.records import read_records

    stock.quiet()
    console = Console(stderr=True)
    model = ElasticModel.from_pretrained(checkpoint, check_digests=False)
    if model.tokenizer is None:
        raise ValueError(f"{checkpoint}: no tokenizer_config.json; audit needs a tokenizer")
    records = read_records(data)[:limit]
    found = measured(model, records, max_length, lambda name: console.print(f"measured {name}"))
    if json:
        rows = [
            {"name": f.size.name, "trained": f.size.trained, "nll": f.loss, "kept": f.kept}
            | {"warning": f.warning}
            for f in found
        ]
        print(json_.dumps(rows, indent=2))
        return
    table = Table("size", "loss, nats", "keeps", "declared")
    for each in found:
        declared = "trained" if each.size.trained else "[red]not trained[/red]"
        table.add_row(each.size.name, f"{each.loss:.3f}", f"{100 * each.kept:.1f} %", declared)
    Console().print(table)
    for each in found:
        if each.warning:
            console.print(f"[red]{each.size.name}: {each.warning}[/red]")
