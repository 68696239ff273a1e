"""Tiny trainers: rows that count upwards, every family, three sizes."""

from pathlib import Path
from typing import Any

from models import elastic, letters_tokenizer, tiny
from torch import Tensor

from star_elastic.model import ElasticModel
from star_elastic.records import Batch, Record
from star_elastic.train.callbacks import Callback
from star_elastic.train.data import Source, Stream
from star_elastic.train.distributed import World
from star_elastic.train.parts import Parts
from star_elastic.train.recipe import Balance, Optimise, Stage
from star_elastic.train.report import StepReport
from star_elastic.train.state import States
from star_elastic.train.teacher import Teacher
from star_elastic.train.trainer import Trainer

SIZES = ("full", "small", "prefix")
_STAGE = ("steps", "tokens", "sequence_length", "rows", "accumulate", "size_probs")
_STAGE += ("learning_rate", "min_lr_ratio", "warmup_steps")


def stream(number: int = 0, rows: int = 2, length: int = 24) -> Stream:
    """Sums of one and two digits, packed."""
    records = [Record(f"{n}+{n}=", str(2 * n), "sum", str(2 * n)) for n in range(3, 60)]
    source = Source("sums", 1.0, records, letters_tokenizer())
    return Stream([source], length, rows, 0, seed=5 + number)


def optimise(**changes: Any) -> Optimise:
    """Six steps of one micro-batch; a change belongs to the only stage or to the whole."""
    values: dict[str, Any] = dict(steps=6, sequence_length=24, rows=2, warmup_steps=2)
    values |= dict(learning_rate=1e-2) | changes
    if "stages" not in values:
        stage = {key: values.pop(key) for key in _STAGE if key in values}
        values["stages"] = [Stage(**stage)]
    values = {key: value for key, value in values.items() if key not in _STAGE}
    return Optimise(**{"save_every": 1000, **values})


def trainer(
    family: str,
    folder: Path | None = None,
    teach: bool = False,
    balance: Balance | None = None,
    model: ElasticModel | None = None,
    **changes: Any,
) -> Trainer:
    """A trainer of the sizes of `models.elastic`; changes are those of `optimise`."""
    model = model or elastic(family)
    taught = ElasticModel(tiny(family))
    settings = optimise(**changes)
    stages = settings.stages
    return Trainer(
        Parts(model.layout, model.state),
        {name: size.config for name, size in model.sizes.items()},
        settings,
        lambda n: stream(n, stages[n].rows, stages[n].sequence_length),
        Teacher(Parts(taught.layout, taught.state)) if teach else None,
        balance=balance,
        states=None if folder is None else States(folder, World()),
    )


class Listener(Callback):
    """Keeps every report."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_step_end(self, report: StepReport) -> None:
        self.reports.append(report)


def weights(trained: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained.weights.items()}


def one_batch() -> Batch:
    return next(stream())
