"""`star-elastic rank`: a parent in nested order, not trained, with its scores beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.rank import Raw


def rank(
    parent: Annotated[str, typer.Argument(help="a model folder, or a hub id")],
    out: Annotated[Path, typer.Option(help="the folder to write; must not exist")],
    data: Annotated[str | None, typer.Option(help="calibration records, JSONL")] = None,
    samples: Annotated[int, typer.Option(min=1, help="records to draw")] = 1024,
    max_length: Annotated[int, typer.Option(min=1, help="tokens of a record, at most")] = 8192,
    depth: Annotated[bool, typer.Option(help="rank layers too; slow")] = False,
    min_layers: Annotated[int, typer.Option(min=1, help="rank layers down to so many")] = 1,
    one_block: Annotated[bool, typer.Option(help="hold one layer in memory at a time")] = False,
    order: Annotated[
        Literal["importance", "random"], typer.Option(help="random: a baseline, without data")
    ] = "importance",
    seed: Annotated[int, typer.Option(help="of the sample, or of the random order")] = 0,
    scores: Annotated[
        Path | None, typer.Option(help="scores of an earlier run, instead of --data")
    ] = None,
    device: Annotated[str, typer.Option(help="where to run the model")] = "cpu",
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
) -> None:
    """Rank all units of a parent (and its layers), and write it with the best ones first.

    Its function stays the same. No size is trained: cut now, smaller ones are poor.
    """
    from star_elastic import rank as ranking
    from star_elastic import stock
    from star_elastic.checkpoint import Checkpoint

    stock.quiet()
    if out.exists() and not overwrite:  # not after hours of calibration
        raise FileExistsError(f"{out} exists already; remove it or choose another --out")
    opened = Checkpoint.open(parent)
    raw = None
    if order == "random":
        orders, layers = ranking.random_order(opened.layout, seed)
        layers = layers if depth else None
    else:
        if scores is not None:
            raw = ranking.load_scores(scores, opened.layout)
        elif data is not None:
            _check_device(device)
            batches = _batches(opened, data, samples, max_length, seed, device)
            raw = _measured(opened, batches, min_layers if depth else None, one_block, device)
        else:
            raise ValueError("rank: say --data, --scores, or --order random")
        orders = ranking.order(ranking.scores_of(opened.layout, raw))
        layers = _layers(opened, raw, min_layers) if depth else None
    ranking.reorder_checkpoint(opened, orders, layers, out, overwrite)
    if raw is not None:
        ranking.save_scores(out / ranking.SCORES, raw)
    _tell(out, order, seed, raw, layers)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _batches(
    opened: "Checkpoint", data: str, samples: int, max_length: int, seed: int, device: str
) -> Any:
    from star_elastic.model import load_tokenizer
    from star_elastic.rank import calibration
    from star_elastic.sources import open_records

    records = open_records(data)
    return calibration(load_tokenizer(opened.path), records, samples, max_length, seed, device)


def _measured(
    opened: "Checkpoint", batches: Any, min_layers: int | None, one_block: bool, device: str
) -> "Raw":
    """The calibration pass; of layers too, down to `min_layers`, unless that is None."""
    from dataclasses import replace

    from star_elastic import rank as ranking
    from star_elastic import stock
    from star_elastic.model import ElasticModel

    if one_block:
        blocks = ranking.Blocks.fetched(opened, device)
    else:
        model = ElasticModel.from_pretrained(opened.path, device=device, check_digests=False)
        blocks = ranking.Blocks(model.parent)
    stock.use_chunk_scan(blocks.model)
    raw = ranking.measure(blocks, batches)
    if min_layers is None:
        return raw
    return replace(raw, depth=ranking.layer_errors(blocks, batches, min_layers))


def _layers(opened: "Checkpoint", raw: "Raw", min_layers: int) -> list[int]:
    from star_elastic.rank import layer_order

    if raw.depth is None:
        raise ValueError("rank: --depth: these scores rank no layers; measure with --data --depth")
    return layer_order(opened.layout, raw.depth, min_layers)


def _tell(out: Path, order: str, seed: int, raw: "Raw | None", layers: list[int] | None) -> None:
    how = f"in random order (seed {seed})"
    if raw is not None:
        how = f"by {order} on {raw.samples:,} samples, {raw.tokens:,} tokens"
    print(f"{out}: units {how}")
    if layers is not None:
        print(f"layers, best first: {' '.join(map(str, layers))}")
    Console(stderr=True).print("[yellow]sorted, not trained: train before slicing it[/yellow]")
