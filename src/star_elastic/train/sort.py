"""The parent in nested order: ranked on a calibration sample, reordered, its sizes declared."""

from collections.abc import Mapping
from typing import Any

from star_elastic import rank, stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel, load_tokenizer
from star_elastic.rank.blocks import CalibrationBatch
from star_elastic.sources import open_records
from star_elastic.submodel import ElasticSpace
from star_elastic.train.recipe import Recipe
from star_elastic.train.sizes import named_sizes

_Ranked = tuple[rank.Order, list[int] | None]


def sorted_parent(recipe: Recipe) -> ElasticModel:
    """The recipe's parent, reordered and not trained: teacher of the run, and its baseline.

    With `rank.one_block` the pass over the data holds one block of it at a time.

    Raises:
        CheckpointError: a parent that cannot be trusted.
        ValueError: sizes that this parent cannot hold.
    """
    opened = Checkpoint.open(str(recipe.parent))
    _space(recipe, opened.layout)  # sizes that cannot be are told before the long pass
    if recipe.rank.one_block:
        blocks = rank.Blocks.fetched(opened)
        stock.use_chunk_scan(blocks.model)
        orders, layers = _ranked(recipe, blocks, load_tokenizer(opened.path))
        model = ElasticModel.from_pretrained(opened.path, check_digests=False)
    else:
        model = ElasticModel.from_pretrained(opened.path, check_digests=False)
        blocks = rank.Blocks(stock.use_chunk_scan(model.submodel()))  # a view: the parent is stock
        orders, layers = _ranked(recipe, blocks, model.tokenizer)
    rank.reorder(model.parent, orders)
    model.layout = Layout(model.parent.config, layers or opened.layout.layer_order)
    model.space = _space(recipe, model.layout)
    return model


def calibration(recipe: Recipe, tokenizer: Any) -> list[CalibrationBatch]:
    """Token ids and mask of a sample of the training records; each corpus has its weight's share.

    Records are cut to the longest sequence of the run.
    """
    length = max(stage.sequence_length for stage in recipe.train.stages)
    corpora = recipe.data.corpora.values()
    total = sum(corpus.weight for corpus in corpora)
    batches: list[CalibrationBatch] = []
    for corpus in corpora:
        records = open_records(corpus.path, corpus.split)
        share = max(1, round(recipe.rank.samples * corpus.weight / total))
        batches += rank.calibration(tokenizer, records, share, length, recipe.train.seed)
    return batches


def _ranked(recipe: Recipe, blocks: rank.Blocks, tokenizer: Any) -> _Ranked:
    """The order of the units, and that of the layers if the recipe wants one."""
    plan, layout = recipe.rank, blocks.layout
    if plan.order == "random":
        orders, layers = rank.random_order(layout, recipe.train.seed)
        return orders, layers if plan.depth else None
    batches = calibration(recipe, tokenizer)
    scores = rank.scores_of(layout, rank.measure(blocks, batches), _fewest_channels(recipe))
    if not plan.depth:
        return rank.order(scores), None
    errors = rank.layer_errors(blocks, batches, plan.min_layers)
    return rank.order(scores), rank.layer_order(layout, errors, plan.min_layers)


def _fewest_channels(recipe: Recipe) -> Mapping[str, int]:
    """The Mamba channels that the smallest size keeps: heads are ranked on these."""
    field = "mamba_head_dim"
    wanted = [
        size[field] for size in recipe.sizes.values() if isinstance(size, dict) and field in size
    ]
    if recipe.router is not None:
        wanted.append(recipe.router.axes.get(field, []))
    flat = [n for value in wanted for n in (value if isinstance(value, list) else [value])]
    return {field: min(flat)} if flat else {}


def _space(recipe: Recipe, layout: Layout) -> ElasticSpace:
    """The recipe's sizes; where layers are not ranked yet but will be, as if they were."""
    if recipe.rank.depth and layout.layer_order is None:
        layout = Layout(layout.config, range(len(layout.blocks)))
    sizes = named_sizes(layout, recipe)
    return ElasticSpace.of(layout, sizes, multiple_of=recipe.multiple_of)
