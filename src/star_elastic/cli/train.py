"""`star-elastic train`: a recipe, run to its end or resumed."""

import os
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    out: Annotated[Path, typer.Option(help="the run's folder")],
    resume: Annotated[bool, typer.Option(help="go on with the run in that folder")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="override a key: train.stages.0.steps=100"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any")] = None,
) -> None:
    """Rank, reorder and train all sizes of a parent jointly; write one elastic checkpoint.

    Many processes: torchrun --nproc-per-node N -m star_elastic train RECIPE --out DIR
    """
    from star_elastic import stock
    from star_elastic.cli.progress import LiveLosses
    from star_elastic.train.interrupt import Interrupted
    from star_elastic.train.recipe import load_recipe
    from star_elastic.train.run import train as run

    stock.quiet()
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one speaks
    console = Console(stderr=True, quiet=not first)
    plan = load_recipe(recipe, set_ or ())
    live = LiveLosses(console, plan.train.steps)
    try:
        with live.progress:
            folder = run(plan, out, resume, [live], live.progress.console.print, device)
    except KeyboardInterrupt as stop:
        again = " ".join(f"--set {text}" for text in set_ or ())
        command = f"star-elastic train {recipe} --out {out} --resume {again}".rstrip()
        console.print(f"\nstopped; to go on: {command}", soft_wrap=True, markup=False)
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        raise typer.Exit(128 + number) from None
    if first:
        print(folder)
