"""`star-elastic train`: a recipe, run to its end or resumed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from star_elastic.train.trainer import StepReport


class LiveLosses:
    """A progress bar that shows the latest loss of every size, smoothed, and the time left."""

    def __init__(self, console: Console, steps: int):
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
        )
        self.task = self.progress.add_task("", total=steps, losses="")
        self.smooth: dict[str, float] = {}

    def __call__(self, report: "StepReport") -> None:
        for size, loss in report.losses.items():
            self.smooth[size] = 0.9 * self.smooth.get(size, loss) + 0.1 * loss
        losses = "  ".join(f"{size} {loss:.4f}" for size, loss in sorted(self.smooth.items()))
        self.progress.update(self.task, completed=report.step, losses=losses)


def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    out: Annotated[Path, typer.Option(help="the run's folder")],
    resume: Annotated[bool, typer.Option(help="go on with the run in that folder")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override a key: train.steps=100")
    ] = None,
) -> None:
    """Rank, reorder and train all sizes of a parent jointly; write one elastic checkpoint."""
    from star_elastic import stock
    from star_elastic.train.recipe import load_recipe
    from star_elastic.train.run import train as run

    stock.quiet()
    console = Console(stderr=True)
    plan = load_recipe(recipe, set_ or ())
    live = LiveLosses(console, plan.train.steps)
    try:
        with live.progress:
            folder = run(plan, out, resume, on_step=live, say=live.progress.console.print)
    except KeyboardInterrupt:
        again = " ".join(f"--set {text}" for text in set_ or ())
        command = f"star-elastic train {recipe} --out {out} --resume {again}".rstrip()
        console.print(f"\nstopped; to go on: {command}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    print(folder)
