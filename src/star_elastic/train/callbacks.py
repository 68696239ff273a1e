"""Who hears of a run: events as in the transformers Trainer, under the same names.

`metrics.jsonl` and TensorBoard always listen. Another listener is a `Callback` with some of these
methods; `report_to: [wandb]` in a recipe adds that one.
"""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from star_elastic.train.report import StepReport


class Callback:
    """Nothing happens; override what you care for. Steps are counted from 1."""

    def on_train_begin(self, step: int, recipe: Mapping[str, Any]) -> None:
        """Training goes on after `step` (0: from the start); the recipe is plain values."""

    def on_step_end(self, report: StepReport) -> None:
        """An optimizer step is done."""

    def on_save(self, step: int) -> None:
        """A state of this step is being written."""

    def on_train_end(self) -> None:
        """The loop is over, finished or not."""


class JsonLines(Callback):
    """One JSON object a step, in a file."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, step: int, recipe: Mapping[str, Any]) -> None:
        """Drop the lines of steps taken after the last saved state: they come again."""
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            os.truncate(self.path, sum(map(len, lines[:step])))  # no moment without the others

    def on_step_end(self, report: StepReport) -> None:
        """Append the report."""
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(vars(report)) + "\n")


class TensorBoard(Callback):
    """Scalars for TensorBoard, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, step: int, recipe: Mapping[str, Any]) -> None:
        """Open the event file; what an earlier run wrote after this step is hidden."""
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def on_step_end(self, report: StepReport) -> None:
        """Write the report's scalars."""
        assert self.writer is not None
        for name, value in report.scalars():
            self.writer.add_scalar(name, value, report.step)

    def on_train_end(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases(Callback):
    """Scalars for Weights & Biases, under the run's name; the package must be installed."""

    def __init__(self, name: str):
        """Raises:
        ValueError: wandb is not installed.
        """
        try:
            self.wandb: Any = importlib.import_module("wandb")
        except ImportError:
            raise ValueError("report_to: wandb is not installed: pip install wandb") from None
        self.name = name
        self.run: Any = None

    def on_train_begin(self, step: int, recipe: Mapping[str, Any]) -> None:
        """Start (or go on with) the run of this name."""
        self.run = self.wandb.init(
            project="star-elastic",
            name=self.name,
            id=self.name,
            resume="allow",
            config=dict(recipe),
        )

    def on_step_end(self, report: StepReport) -> None:
        """Log the report's scalars."""
        self.run.log(dict(report.scalars()), step=report.step)

    def on_train_end(self) -> None:
        """Finish the run."""
        if self.run is not None:
            self.run.finish()
