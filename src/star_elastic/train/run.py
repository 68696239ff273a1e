"""One run of a recipe: load, rank, reorder, train, write the elastic checkpoint.

A run folder holds `sorted/` (the reordered, untrained parent: teacher and baseline), `state/`,
`metrics.jsonl`, `tensorboard/`, and at the end `elastic/` (or `parent/` when trained from nothing).
A parent that is elastic already, to be trained for its codes, stays where it is.
Under `torchrun` every process calls `train`; the first one ranks and writes.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from star_elastic import stock, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel, load_tokenizer
from star_elastic.sources import open_records
from star_elastic.submodel import ElasticSpace, Fields, Training
from star_elastic.train import curriculum, plan, qad
from star_elastic.train.callbacks import Callback, JsonLines, TensorBoard, WeightsAndBiases
from star_elastic.train.coded import Coding
from star_elastic.train.data import Source, Stream
from star_elastic.train.distributed import World, shard, world
from star_elastic.train.load import load_parts, whole_state
from star_elastic.train.parts import Parts
from star_elastic.train.recipe import Recipe
from star_elastic.train.router import ROUTER, Router, metric_of, save_router, warm_up
from star_elastic.train.routing import RouterTraining
from star_elastic.train.sizes import named_sizes
from star_elastic.train.sort import write_sorted
from star_elastic.train.state import States
from star_elastic.train.teacher import Teacher
from star_elastic.train.trainer import Trainer

SORTED, ELASTIC, PARENT, STATE = "sorted", "elastic", "parent", "state"
METRICS, BOARD = "metrics.jsonl", "tensorboard"
Say = Callable[[str], None]


def _silent(_: str) -> None:
    """Nobody listens."""


def train(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    say: Say = _silent,
    device: str | None = None,
) -> Path:
    """Run a recipe; returns the folder of the finished checkpoint.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is false.
        ValueError: what the recipe says cannot be.
        Interrupted: on Ctrl-C or SIGTERM, after the state was saved.
        DivergedError: a loss or gradient is not finite.
    """
    with world(device) as here:
        held = (SORTED, ELASTIC, PARENT, STATE)
        if here.any(not resume and any((out / part).exists() for part in held)):
            raise FileExistsError(f"{out} holds a run already; --resume goes on with it")
        curriculum.check_processes(recipe.train, here.size)  # before the long pass, not after
        out.mkdir(parents=True, exist_ok=True)
        run = _Run(recipe, out, here, say if here.is_first else _silent)
        return run.train(resume, callbacks)


def make_parent(recipe: Recipe) -> ElasticModel:
    """A parent with fresh weights, as the recipe's `init` says."""
    assert recipe.init is not None
    values = dict(recipe.init.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(recipe.init.seed)
    parent = stock.build(config).float()
    tokenizer = load_tokenizer(recipe.init.tokenizer)
    return ElasticModel(parent, tokenizer=tokenizer)


def streams(recipe: Recipe, tokenizer: Any) -> Callable[[int], Stream]:
    """The data of the n-th stage of a recipe."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    records = {name: open_records(c.path, c.split) for name, c in recipe.data.corpora.items()}

    def stream(number: int) -> Stream:
        stage = recipe.train.stages[number]
        weights = {name: corpus.weight for name, corpus in recipe.data.corpora.items()}
        sources = [
            Source(name, weight, records[name], tokenizer, recipe.data.corpora[name].loss_on)
            for name, weight in (stage.mix or weights).items()
            if weight > 0
        ]
        seed = recipe.train.seed + 1000 * number  # another order of the documents in each stage
        return Stream(sources, stage.sequence_length, stage.rows, pad or 0, seed)

    return stream


class _Run:
    """A recipe in its folder, in one process of a world."""

    def __init__(self, recipe: Recipe, out: Path, here: World, say: Say):
        self.recipe = recipe
        self.out = out
        self.here = here
        self.say = say
        self.parent: Checkpoint | None = None  # in nested order; none if it is made from nothing

    def train(self, resume: bool, callbacks: Sequence[Callback]) -> Path:
        listeners = self._listeners(callbacks)
        trainer, dtypes, tokenizer = self._prepare()
        trainer.callbacks = listeners
        if resume and trainer.resume():
            self.say(f"going on from step {trainer.position.step}")
        values = json.loads(self.recipe.model_dump_json())
        for callback in trainer.callbacks:
            callback.on_train_begin(trainer.position.step, values)
        try:
            trainer.run()
        finally:
            for callback in trainer.callbacks:
                callback.on_train_end()
        return self._write(trainer, dtypes, tokenizer)

    def _prepare(self) -> tuple[Trainer, Mapping[str, torch.dtype], Any]:
        if self.recipe.init is not None:
            model = make_parent(self.recipe)
            nn.Module.to(model.parent, self.here.device)
            parts = shard(Parts(model.layout, model.state), self.here, self._gather())
            sizes: dict[str, Fields] = {"full": {}}
            trainer = self._trainer(parts, sizes, model.tokenizer)
            return trainer, dict.fromkeys(model.layout.weights, torch.float32), model.tokenizer
        if self.recipe.quantize is not None:
            return self._prepare_quantized()
        opened = self.parent = self._sorted()
        tokenizer = load_tokenizer(opened.path)
        parts = load_parts(opened, self.here, torch.float32, self._gather())
        sizes = {**named_sizes(opened.layout, self.recipe)}
        teacher = self._teacher(opened, tokenizer)
        routing = self._routing(parts, sizes)
        trainer = self._trainer(parts, sizes, tokenizer, teacher, routing)
        self._tell(opened.layout, trainer)
        dtypes = {name: tensors.dtype_of(opened, w) for name, w in opened.layout.weights.items()}
        return trainer, dtypes, tokenizer

    def _prepare_quantized(self) -> tuple[Trainer, Mapping[str, torch.dtype], Any]:
        assert self.recipe.quantize is not None
        opened = self.parent = qad.open_parent(self.recipe, self.here.is_first)
        sizes = qad.sizes_of(self.recipe, opened)
        coding = qad.coding_of(self.recipe, opened, sizes)
        tokenizer = load_tokenizer(opened.path)
        gather = self._gather() if coding.is_stored_in(torch.bfloat16) else None
        parts = load_parts(opened, self.here, torch.float32, gather)
        taught = load_parts(opened, self.here, offload=self.recipe.distil.offload)
        teacher = Teacher(taught, own=self.recipe.quantize.teacher == "own")
        trainer = self._trainer(parts, sizes, tokenizer, teacher, coding=coding)
        self._tell(opened.layout, trainer)
        return trainer, coding.stored, tokenizer

    def _sorted(self) -> Checkpoint:
        """The reordered parent on disk; the first process makes it, if nobody has yet."""
        folder = self.out / SORTED
        if self.here.is_first and not folder.is_dir():
            self.say("ranking and reordering the parent")
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # what a kill left behind
            write_sorted(self.recipe, partial)
            partial.rename(folder)
        self.here.wait()
        return Checkpoint.open(folder, check_digests=self.here.is_first)

    def _teacher(self, parent: Checkpoint, tokenizer: Any) -> Teacher:
        distil = self.recipe.distil
        opened = parent if distil.teacher is None else Checkpoint.open(distil.teacher)
        if opened is not parent:
            _check_teacher(opened, parent, tokenizer, distil.hidden)
        return Teacher(load_parts(opened, self.here, offload=distil.offload))

    def _routing(self, parts: Parts, sizes: dict[str, Fields]) -> RouterTraining | None:
        if self.recipe.router is None:
            return None
        budgets = {name: s for name, s in self.recipe.sizes.items() if isinstance(s, float)}
        metric = metric_of(self.recipe.router, parts.layout)
        seed = self.recipe.train.seed
        router = Router(parts.layout, self.recipe.router, metric, list(budgets.values()), seed)
        warm_up(router)
        routing = RouterTraining(router, parts, budgets, seed)
        routing.settle(sizes)
        return routing

    def _trainer(
        self,
        parts: Parts,
        sizes: Mapping[str, Fields],
        tokenizer: Any,
        teacher: Teacher | None = None,
        routing: RouterTraining | None = None,
        coding: Coding | None = None,
    ) -> Trainer:
        assert self.parent is not None or coding is None
        multiple_of = self.recipe.multiple_of
        if coding is not None and self.parent is not None:
            multiple_of = qad.steps_of(coding, self.parent)
        return Trainer(
            parts,
            sizes,
            self.recipe.train,
            streams(self.recipe, tokenizer),
            teacher,
            self.recipe.distil,
            self.recipe.balance,
            routing,
            States(self.out / STATE, self.here),
            self.here,
            multiple_of=multiple_of,
            coding=coding,
        )

    def _tell(self, layout: Layout, trainer: Trainer) -> None:
        """Print the plan; the time is measured, with one micro-batch per size and stage."""
        assert trainer.teacher is not None
        teach = sum(t.nbytes for t in trainer.teacher.parts.tensors().values()) * self.here.size
        settings = self.recipe.train
        for line in plan.describe(layout, trainer.sizes, settings, teach, self.here.size):
            self.say(line)
        stages = range(len(settings.stages))
        pace = [{name: trainer.seconds_of(name, n) for name in trainer.sizes} for n in stages]
        took = plan.seconds(settings, pace) / self.here.size
        self.say(f"time: about {took / 60:.1f} minutes, by one micro-batch of each size")

    def _gather(self) -> torch.dtype | None:
        return torch.bfloat16 if self.recipe.train.dtype == "bfloat16" else None

    def _listeners(self, more: Sequence[Callback]) -> list[Callback]:
        if not self.here.is_first:
            return []
        always = [JsonLines(self.out / METRICS), TensorBoard(self.out / BOARD)]
        asked = [WeightsAndBiases(self.recipe.name) for _ in self.recipe.report_to]
        return [*always, *asked, *more]

    def _write(self, trainer: Trainer, dtypes: Mapping[str, torch.dtype], tokenizer: Any) -> Path:
        folder = self.out / (PARENT if self.parent is None else ELASTIC)
        state = whole_state(trainer.parts, dtypes, self.here)
        if state is not None:
            source = None if self.parent is None else self.parent.path
            layout = trainer.parts.layout
            tensors.write(
                folder,
                state,
                layout,
                self._space(layout, trainer),
                source,
                tokenizer,
                overwrite=True,
                beside=self._beside(trainer),
            )
        self.here.wait()
        return folder

    def _space(self, layout: Layout, trainer: Trainer) -> ElasticSpace | None:
        if self.parent is None:
            return None
        position = trainer.position
        if self.recipe.quantize is not None:
            return qad.space_of(self.recipe, self.parent, trainer.sizes, position)
        training = Training(recipe=self.recipe.name, steps=position.step, tokens=position.tokens)
        return ElasticSpace.of(layout, trainer.sizes, True, training, self.recipe.multiple_of)

    def _beside(self, trainer: Trainer) -> dict[str, Callable[[Path], None]]:
        if self.parent is not None and self.recipe.quantize is not None:
            return qad.beside(self.parent)
        if trainer.routing is None:
            return {}
        router = trainer.routing.router
        return {ROUTER: lambda path: save_router(router, path)}


def _check_teacher(opened: Checkpoint, parent: Checkpoint, tokenizer: Any, hidden: float) -> None:
    """Another teacher must speak the parent's vocabulary.

    Raises:
        ValueError: naming what differs.
    """
    sizes = [each.layout.sizes["vocab_size"] for each in (opened, parent)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"distil.teacher: vocabulary {sizes[0]}, the parent's is {sizes[1]}")
    if load_tokenizer(opened.path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"distil.teacher: {opened.path} has another tokenizer than the parent")
    if hidden:
        raise ValueError("distil.hidden: another teacher's hidden states are not the parent's")
