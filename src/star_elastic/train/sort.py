"""The parent in nested order: ranked on a calibration sample, reordered, its sizes declared."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from star_elastic import rank, stock
from star_elastic.checkpoint import Checkpoint, declare
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel, load_tokenizer
from star_elastic.rank.blocks import CalibrationBatch
from star_elastic.sources import open_records
from star_elastic.submodel import ElasticSpace
from star_elastic.train.recipe import Recipe
from star_elastic.train.sizes import named_sizes


@dataclass(frozen=True)
class Ranked:
    """What ranking found: the order of units and of layers, and the raw sums it rests on."""

    orders: rank.Order
    layers: list[int] | None
    raw: rank.Raw | None


def write_sorted(recipe: Recipe, folder: Path) -> None:
    """Rank the recipe's parent and write it in nested order, with its scores, sizes declared.

    Tensors are reordered one at a time; with `rank.one_block` the calibration pass too holds one
    block of the parent at a time.

    Raises:
        CheckpointError: a parent that cannot be trusted.
        ValueError: sizes that this parent cannot hold.
    """
    opened = Checkpoint.open(str(recipe.parent))
    _space(recipe, opened.layout)  # sizes that cannot be are told before the long pass
    ranked = _ranked(recipe, _blocks(recipe, opened), load_tokenizer(opened.path))
    rank.reorder_checkpoint(opened, ranked.orders, ranked.layers, folder)
    if ranked.raw is not None:
        rank.save_scores(folder / rank.SCORES, ranked.raw)
    written = Checkpoint.open(folder, check_digests=False)
    declare(written, _space(recipe, written.layout))


def sorted_parent(recipe: Recipe) -> ElasticModel:
    """The same in memory: the parent, reordered and not trained.

    Raises:
        CheckpointError: a parent that cannot be trusted.
        ValueError: sizes that this parent cannot hold.
    """
    opened = Checkpoint.open(str(recipe.parent))
    _space(recipe, opened.layout)
    ranked = _ranked(recipe, _blocks(recipe, opened), load_tokenizer(opened.path))
    model = ElasticModel.from_pretrained(opened.path, check_digests=False)
    rank.reorder(model.parent, ranked.orders)
    model.layout = Layout(model.parent.config, ranked.layers or opened.layout.layer_order)
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


def _blocks(recipe: Recipe, opened: Checkpoint) -> rank.Blocks:
    if recipe.rank.one_block:
        blocks = rank.Blocks.fetched(opened)
    else:
        parent = ElasticModel.from_pretrained(opened.path, check_digests=False)
        blocks = rank.Blocks(parent.parent)
    stock.use_chunk_scan(blocks.model)
    return blocks


def _ranked(recipe: Recipe, blocks: rank.Blocks, tokenizer: Any) -> Ranked:
    plan, layout = recipe.rank, blocks.layout
    if plan.order == "random":
        orders, layers = rank.random_order(layout, recipe.train.seed)
        return Ranked(orders, layers if plan.depth else None, None)
    batches = calibration(recipe, tokenizer)
    raw = rank.measure(blocks, batches)
    orders = rank.order(rank.scores_of(layout, raw, _fewest_channels(recipe)))
    if not plan.depth:
        return Ranked(orders, None, raw)
    errors = rank.layer_errors(blocks, batches, plan.min_layers)
    layers = rank.layer_order(layout, errors, plan.min_layers)
    return Ranked(orders, layers, replace(raw, depth=errors))


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
