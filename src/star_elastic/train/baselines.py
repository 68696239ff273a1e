"""What a size is worth: the same size merely sorted and cut, and the same size trained alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from star_elastic import stock
from star_elastic.evaluate import Quality, evaluate_size
from star_elastic.model import ElasticModel
from star_elastic.records import Record
from star_elastic.train.recipe import Recipe
from star_elastic.train.run import make_batches
from star_elastic.train.sort import sorted_parent
from star_elastic.train.trainer import StepReport, Trainer


def measure_baselines(
    recipe: Recipe,
    sizes: Mapping[str, Mapping[str, int]],
    heldout: Sequence[Record],
    on_step: Callable[[StepReport], None] = lambda report: None,
    **settings: Any,
) -> dict[str, dict[str, Quality]]:
    """Both baselines of some sizes: {size: {"sorted": quality, "alone": quality}}.

    Args:
        sizes: config fields by name; settings: those of `evaluate_size`.
    """
    untrained = sorted_parent(recipe)
    measured: dict[str, dict[str, Quality]] = {}
    for name, fields in sizes.items():
        cut = untrained.submodel(**fields)
        alone = train_alone(recipe, fields, on_step)
        measured[name] = {
            "sorted": evaluate_size(cut, untrained.tokenizer, heldout, **settings),
            "alone": evaluate_size(alone.parent, alone.tokenizer, heldout, **settings),
        }
    return measured


def train_alone(
    recipe: Recipe,
    fields: Mapping[str, int],
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> ElasticModel:
    """A stock model of one size of the recipe's parent, from random weights, with cross-entropy.

    As many steps, tokens and the same data as the elastic run; `recipe.alone` has its rates.
    """
    parent = ElasticModel.from_pretrained(str(recipe.parent))
    torch.manual_seed(recipe.train.seed)
    fresh = stock.build(stock.child_config(parent.parent.config, fields)).float()
    model = ElasticModel(fresh, tokenizer=parent.tokenizer)
    rates = {**recipe.alone.model_dump(), "size_probs": None}
    settings = recipe.train.model_copy(update=rates)
    Trainer(model, None, make_batches(recipe, parent.tokenizer), settings).run(on_step)
    model.parent.eval()
    return model
