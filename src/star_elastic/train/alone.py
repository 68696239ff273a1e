"""The baseline: one size by itself, from random weights, on the same tokens."""

from collections.abc import Callable, Mapping

import torch

from star_elastic import stock
from star_elastic.model import ElasticModel
from star_elastic.train.recipe import Recipe
from star_elastic.train.run import make_batches
from star_elastic.train.trainer import StepReport, Trainer


def train_alone(
    recipe: Recipe,
    fields: Mapping[str, int],
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> ElasticModel:
    """A stock model of one size of the recipe's parent, trained with next-token cross-entropy.

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
