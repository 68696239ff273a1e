"""What a training run looks like while it runs."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from star_elastic.train.callbacks import Callback
from star_elastic.train.report import StepReport


class LiveLosses(Callback):
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

    def on_step_end(self, report: StepReport) -> None:
        """Show the step."""
        for size, loss in report.losses.items():
            self.smooth[size] = 0.9 * self.smooth.get(size, loss) + 0.1 * loss
        losses = "  ".join(f"{size} {loss:.4f}" for size, loss in sorted(self.smooth.items()))
        self.progress.update(self.task, completed=report.step, losses=losses)
