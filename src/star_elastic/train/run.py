"""One run of a recipe: load, rank, reorder, train, write the elastic checkpoint.

A run folder holds `sorted/` (the reordered, untrained parent: teacher and baseline), `state/`,
`metrics.jsonl`, and at the end `elastic/` (or `parent/` when trained from nothing).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from star_elastic import checkpoint, stock
from star_elastic.model import ElasticModel, load_tokenizer
from star_elastic.records import encode, read_records
from star_elastic.submodel import ElasticSpace, Training
from star_elastic.train.data import Batches
from star_elastic.train.recipe import Recipe
from star_elastic.train.sort import sorted_parent
from star_elastic.train.trainer import StepReport, Trainer

SORTED, ELASTIC, PARENT, STATE = "sorted", "elastic", "parent", "state"
METRICS = "metrics.jsonl"


def train(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Run a recipe; returns the folder of the finished checkpoint.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is false.
        KeyboardInterrupt: after the state was saved.
    """
    if not resume and any((out / part).exists() for part in (SORTED, ELASTIC, PARENT, STATE)):
        raise FileExistsError(f"{out} holds a run already; --resume goes on with it")
    out.mkdir(parents=True, exist_ok=True)
    model, teacher, batches = _prepare(recipe, out, say)
    trainer = Trainer(model, teacher, batches, recipe.train, out / STATE)
    if resume and trainer.resume():
        say(f"going on from step {trainer.position.step}")
    _forget_after(out / METRICS, trainer.position.step)
    with (out / METRICS).open("a", encoding="utf-8") as metrics:

        def log(report: StepReport) -> None:
            metrics.write(json.dumps(vars(report)) + "\n")
            metrics.flush()
            on_step(report)

        trainer.run(log)
    trainer.save()
    return _write(recipe, out, trainer, teacher)


def make_parent(recipe: Recipe) -> ElasticModel:
    """A parent with fresh weights, as the recipe's `init` says."""
    assert recipe.init is not None
    values = dict(recipe.init.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(recipe.init.seed)
    parent = stock.build(config).float()
    tokenizer = load_tokenizer(recipe.init.tokenizer)
    return ElasticModel(parent, tokenizer=tokenizer)


def _prepare(
    recipe: Recipe, out: Path, say: Callable[[str], None]
) -> tuple[ElasticModel, PreTrainedModel | None, Batches]:
    """What is trained, what it learns from, and the data."""
    if recipe.init is not None:
        model = make_parent(recipe)
        return model, None, make_batches(recipe, model.tokenizer)
    folder = out / SORTED
    if folder.is_dir():
        parent = ElasticModel.from_pretrained(folder)
    else:
        say("ranking and reordering the parent")
        parent = sorted_parent(recipe)
        parent.save_pretrained(folder)
    batches = make_batches(recipe, parent.tokenizer)
    return ElasticModel.from_pretrained(folder, dtype=torch.float32), parent.parent, batches


def make_batches(recipe: Recipe, tokenizer: Any) -> Batches:
    """The recipe's training data as a stream of micro-batches."""
    records = read_records(recipe.data.train)
    examples = encode(tokenizer, records, recipe.data.max_length, recipe.data.loss_on)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Batches(examples, recipe.train.tokens, pad or 0, recipe.train.seed)


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that were taken after the last saved state: they come again."""
    if metrics.exists():
        lines = metrics.read_text("utf-8").splitlines(keepends=True)
        metrics.write_text("".join(lines[:step]), "utf-8")


def _write(recipe: Recipe, out: Path, trainer: Trainer, teacher: PreTrainedModel | None) -> Path:
    model = trainer.model
    state = {name: tensor.detach() for name, tensor in model.state.items()}
    if teacher is None:
        folder, space, dtypes = out / PARENT, None, {name: torch.float32 for name in state}
    else:
        folder = out / ELASTIC
        dtypes = {name: t.dtype for name, t in stock.get_tensors(teacher).items()}
        position = trainer.position
        training = Training(recipe=recipe.name, steps=position.step, tokens=position.tokens)
        sizes = {name: size.config for name, size in model.sizes.items()}
        space = ElasticSpace.of(model.layout, sizes, True, training, recipe.multiple_of)
    state = {name: tensor.to(dtypes[name]) for name, tensor in state.items()}
    checkpoint.write(
        folder, state, model.layout, space, model.source, model.tokenizer, overwrite=True
    )
    return folder
