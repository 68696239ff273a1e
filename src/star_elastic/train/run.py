"""One run of a recipe: load, rank, reorder, train, write the elastic checkpoint.

A run folder holds `sorted/` (the reordered, untrained parent: teacher and baseline), `state/`,
`metrics.jsonl`, and at the end `elastic/` (or `parent/` when trained from nothing).
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from star_elastic import checkpoint, rank, stock
from star_elastic.model import ElasticModel
from star_elastic.records import encode, read_records
from star_elastic.submodel import ElasticSpace, Training
from star_elastic.train.data import Batches
from star_elastic.train.recipe import Recipe
from star_elastic.train.trainer import StepReport, Trainer

SORTED, ELASTIC, PARENT = "sorted", "elastic", "parent"


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
    if out.exists() and any(out.iterdir()) and not resume:
        raise FileExistsError(f"{out} holds a run already; --resume goes on with it")
    out.mkdir(parents=True, exist_ok=True)
    if recipe.init is not None:
        model, teacher = make_parent(recipe), None
    else:
        if not (out / SORTED).is_dir():
            say("ranking and reordering the parent")
            sort_parent(recipe).save_pretrained(out / SORTED)
        model = ElasticModel.from_pretrained(out / SORTED, dtype=torch.float32)
        teacher = ElasticModel.from_pretrained(out / SORTED).parent
    trainer = Trainer(model, teacher, _batches(recipe, model.tokenizer), recipe.train, out / "state")
    if resume and trainer.resume():
        say(f"going on from step {trainer.position.step}")
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:

        def log(report: StepReport) -> None:
            metrics.write(json.dumps(vars(report)) + "\n")
            metrics.flush()
            on_step(report)

        trainer.run(log)
    trainer.save()
    return _write(recipe, out, trainer, teacher)


def sort_parent(recipe: Recipe) -> ElasticModel:
    """The recipe's parent with every unit ranked and put in nested order; not trained yet."""
    assert recipe.parent is not None
    model = ElasticModel.from_pretrained(recipe.parent)
    batches = itertools.islice(_batches(recipe, model.tokenizer), _calibration_batches(recipe, model))
    pairs = ((batch.input_ids, batch.mask) for batch in batches)
    rank.reorder(model.parent, rank.order(rank.score(model.parent, pairs)))
    model.space = ElasticSpace.of(
        model.layout, recipe.sizes, trained=False, multiple_of=recipe.multiple_of
    )
    return model


def make_parent(recipe: Recipe) -> ElasticModel:
    """A parent with fresh weights, as the recipe's `init` says."""
    assert recipe.init is not None
    values = dict(recipe.init.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(recipe.init.seed)
    parent = stock.build(config).float()
    tokenizer = AutoTokenizer.from_pretrained(recipe.init.tokenizer)
    return ElasticModel(parent, tokenizer=tokenizer)


def _batches(recipe: Recipe, tokenizer: Any) -> Batches:
    records = read_records(recipe.data.train)
    examples = encode(tokenizer, records, recipe.data.max_length, recipe.data.loss_on)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Batches(examples, recipe.train.tokens, pad or 0, recipe.train.seed)


def _calibration_batches(recipe: Recipe, model: ElasticModel) -> int:
    batches = _batches(recipe, model.tokenizer)
    rows = sum(len(batch.input_ids) for batch in itertools.islice(batches, 8)) / 8
    return max(1, round(recipe.rank.samples / rows))


def _write(
    recipe: Recipe, out: Path, trainer: Trainer, teacher: PreTrainedModel | None
) -> Path:
    model = trainer.model
    state = {name: tensor.detach() for name, tensor in model.state.items()}
    if teacher is None:
        checkpoint.write(
            out / PARENT, state, model.layout, None, model.source, model.tokenizer, overwrite=True
        )
        return out / PARENT
    stored = ElasticModel(teacher).state  # the parent's own dtypes
    state = {name: tensor.to(stored[name].dtype) for name, tensor in state.items()}
    position = trainer.position
    training = Training(recipe=recipe.name, steps=position.step, tokens=position.tokens)
    space = ElasticSpace.of(
        model.layout, recipe.sizes, True, training, multiple_of=recipe.multiple_of
    )
    checkpoint.write(out / ELASTIC, state, model.layout, space, model.source, overwrite=True)
    return out / ELASTIC
