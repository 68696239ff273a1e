"""The parent in nested order: ranked on a calibration sample, reordered, its sizes declared."""

import random
from collections.abc import Iterator

from torch import Tensor

from star_elastic import rank
from star_elastic.model import ElasticModel
from star_elastic.records import collate, encode, read_records
from star_elastic.submodel import ElasticSpace
from star_elastic.train.recipe import Recipe
from star_elastic.train.sizes import named_sizes

_ROWS = 32  # calibration rows in a batch


def sorted_parent(recipe: Recipe) -> ElasticModel:
    """The recipe's parent, reordered and not trained: teacher of the run, and its baseline.

    Raises:
        CheckpointError: a parent that cannot be trusted.
        ValueError: sizes that this parent cannot hold.
    """
    model = ElasticModel.from_pretrained(str(recipe.parent))
    sizes = named_sizes(model.layout, recipe)
    model.space = ElasticSpace.of(model.layout, sizes, multiple_of=recipe.multiple_of)
    rank.reorder(model.parent, rank.order(rank.score(model.parent, calibration(recipe, model))))
    return model


def calibration(recipe: Recipe, model: ElasticModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask of a sample of the training records, in batches."""
    records = read_records(recipe.data.train)
    count = min(recipe.rank.samples, len(records))
    sample = random.Random(f"rank/{recipe.train.seed}").sample(records, count)
    examples = encode(model.tokenizer, sample, recipe.data.max_length)
    examples.sort(key=lambda example: len(example.ids))
    for start in range(0, count, _ROWS):
        batch = collate(examples[start : start + _ROWS], pad=0)
        yield batch.input_ids.to(model.parent.device), batch.mask.to(model.parent.device)
