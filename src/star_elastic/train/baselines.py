"""What a size is worth: the same size merely sorted and cut, and the same size trained alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from star_elastic import configs, stock
from star_elastic.evaluate import Quality, evaluate_size
from star_elastic.model import ElasticModel
from star_elastic.records import Record
from star_elastic.submodel import Fields
from star_elastic.train.callbacks import Callback
from star_elastic.train.parts import Parts
from star_elastic.train.recipe import Balance, Recipe
from star_elastic.train.run import streams
from star_elastic.train.sort import sorted_parent
from star_elastic.train.trainer import Trainer


def measure_baselines(
    recipe: Recipe,
    sizes: Mapping[str, Fields],
    heldout: Sequence[Record],
    callbacks: Sequence[Callback] = (),
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
        alone = train_alone(recipe, fields, callbacks)
        measured[name] = {
            "sorted": evaluate_size(cut, untrained.tokenizer, heldout, **settings),
            "alone": evaluate_size(alone.parent, alone.tokenizer, heldout, **settings),
        }
    return measured


def train_alone(
    recipe: Recipe,
    fields: Fields,
    callbacks: Sequence[Callback] = (),
) -> ElasticModel:
    """A stock model of one size of the recipe's parent, from random weights, with cross-entropy.

    As many steps, tokens and the same data as the elastic run; `recipe.alone` has its rates.
    """
    parent = ElasticModel.from_pretrained(str(recipe.parent))
    torch.manual_seed(recipe.train.seed)
    fresh = stock.build(configs.child_config(parent.layout, fields)).float()
    model = ElasticModel(fresh, tokenizer=parent.tokenizer)
    alone = {"learning_rate": recipe.alone.learning_rate, "size_probs": None}
    stages = [stage.model_copy(update=alone) for stage in recipe.train.stages]
    settings = recipe.train.model_copy(update={"stages": stages, "sizes_per_batch": 1})
    balance = Balance(rate=recipe.alone.balance_rate)
    parts, data = Parts(model.layout, model.state), streams(recipe, parent.tokenizer)
    Trainer(parts, {"full": {}}, settings, data, balance=balance, callbacks=callbacks).run()
    model.parent.eval()
    return model
