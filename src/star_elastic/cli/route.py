"""`star-elastic route`: learn which requests need a larger size."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from star_elastic.model import ElasticModel
    from star_elastic.serve.difficulty import Difficulty
    from star_elastic.serve.difficulty.graded import Graded
    from star_elastic.serve.difficulty.outcomes import Outcomes

route_app = typer.Typer(
    name="route",
    help="Route requests by difficulty: routine ones to the small size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@route_app.callback()
def _route() -> None:
    """A group, though it has one verb: `star-elastic route fit`."""


@route_app.command()
def fit(
    checkpoint: Annotated[str, typer.Argument(help="an elastic checkpoint: a folder, or a hub id")],
    data: Annotated[Path, typer.Option(help="records with answers, or graded outcomes, JSONL")],
    out: Annotated[Path, typer.Option(help="the file to write: difficulty.json")],
    sizes: Annotated[
        str | None, typer.Option(help="small,full: route among these only; default: all")
    ] = None,
    probe_tokens: Annotated[
        int, typer.Option(min=0, max=64, help="of the small size's answer to look at; 0: none")
    ] = 4,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="of an answer; their length, where graded records tell none")
    ] = 256,
    held_out: Annotated[float, typer.Option(min=0.1, max=0.9, help="share that measures")] = 0.3,
    limit: Annotated[int | None, typer.Option(min=1, help="use the first N records")] = None,
    slots: Annotated[int, typer.Option(min=1, help="requests at once")] = 16,
    device: Annotated[str, typer.Option(help="where to run the model")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="of the split")] = 0,
    overwrite: Annotated[bool, typer.Option(help="replace the file if it exists")] = False,
    json: Annotated[bool, typer.Option("--json", help="the file, on stdout too")] = False,
) -> None:
    """Learn from outcomes which requests gain from a larger size, and say if that beats chance.

    Records are {"prompt" or "messages", "answer"}, which every size answers here and is graded by
    exact match, or {"prompt" or "messages", "outcomes": {"small": 1, "full": 0.5}}.
    """
    from star_elastic import stock
    from star_elastic.model import ElasticModel
    from star_elastic.serve.difficulty import file
    from star_elastic.serve.difficulty.fitting import check_count, verdict
    from star_elastic.serve.difficulty.fitting import fit as fit_difficulty
    from star_elastic.serve.difficulty.graded import read_graded

    stock.quiet()
    if out.exists() and not overwrite:  # not after hours of answers
        raise FileExistsError(f"{out} exists already; remove it or choose another --out")
    model = ElasticModel.from_pretrained(checkpoint, device=device, check_digests=False)
    names = _sizes(model, sizes)
    records = read_graded(data, names)[:limit]
    try:
        check_count(len(records))
        outcomes = _ask(model, records, names, probe_tokens, max_tokens, slots)
        found = fit_difficulty(outcomes, [0, probe_tokens], checkpoint, seed, held_out)
    except ValueError as error:
        raise ValueError(f"{data}: {error}") from None
    file.save(found, out, overwrite)
    if json:
        print(found.model_dump_json(indent=2))
        return
    console = Console()
    console.print(_table(found))
    console.print(f"{out}: {verdict(found)}", soft_wrap=True, highlight=False)


def _sizes(model: "ElasticModel", text: str | None) -> list[str]:
    names = list(model.sizes) if text is None else text.split(",")
    for name in names:
        if name not in model.sizes:
            raise ValueError(
                f"--sizes {text}: no size {name!r}; there are {', '.join(model.sizes)}"
            )
    if len(names) != len(set(names)) or len(names) < 2:
        raise ValueError(f"--sizes {','.join(names)}: a router chooses among two sizes at least")
    return names


def _ask(
    model: "ElasticModel",
    records: Sequence["Graded"],
    names: Sequence[str],
    probe_tokens: int,
    max_tokens: int,
    slots: int,
) -> "Outcomes":
    from rich.progress import Progress

    from star_elastic.serve.difficulty.asking import ask

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bars = {name: progress.add_task(name, total=len(records), visible=False) for name in names}

        def tell(size: str, done: int, count: int) -> None:
            progress.update(bars[size], completed=done, total=count, visible=True)

        return ask(model, records, names, probe_tokens, max_tokens, slots, tell)


def _table(found: "Difficulty") -> Table:
    how = found.provenance
    aucs = ", ".join(
        f"{n} tokens {a.mean:.2f} ({a.low:.2f} to {a.high:.2f})" for n, a in how.auc.items()
    )
    count = how.fitted + how.held_out
    title = f"{how.held_out} held-out requests of {count}; AUC with a probe of {aucs}"
    heads = ("target", "probe", f"from which difficulty on: {', '.join(found.sizes[1:])}")
    table = Table(*heads, "cost", "accuracy", "random mixing", "difference (95 %)", title=title)
    for row in found.table:
        apart = row.difference
        table.add_row(
            f"{row.share:.1%}",
            str(row.probe_tokens),
            ", ".join("never" if each >= 1 else f"{each:.3f}" for each in row.thresholds),
            f"{row.cost_share:.1%}",
            f"{row.accuracy:.1%}",
            f"{row.random:.1%}",
            f"{apart.mean:+.1%} ({apart.low:+.1%} to {apart.high:+.1%})",
        )
    return table
