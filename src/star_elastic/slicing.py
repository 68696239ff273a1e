"""One size as a stock folder of its own, cut out of an elastic checkpoint with no training."""

from pathlib import Path

from star_elastic import card, stock
from star_elastic.checkpoint import Checkpoint, copy_companions
from star_elastic.folder import atomic_folder, write_json, write_tensors
from star_elastic.submodel import Fields, Submodel, check_fields, submodel


def slice_checkpoint(
    checkpoint: Checkpoint,
    target: str | Path,
    size: str | None = None,
    fields: Fields | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
) -> Submodel:
    """Cut one size out into a stock folder that loads without this package.

    Exactly one of `size` (a name) and `fields` (config fields) says which.

    Raises:
        CheckpointError: no such size.
        ValueError: a size this parent cannot hold, or that the stock class cannot express.
        FileExistsError: the target exists and `overwrite` is false.
    """
    if (size is None) == (fields is None):
        raise ValueError("slice: say either a size's name or config fields")
    if Path(target).resolve() == checkpoint.path.resolve():
        raise ValueError(f"slice: {target} is the checkpoint itself")
    if size is not None:
        cut = checkpoint.size(size)
    else:
        check_fields(checkpoint.layout, fields or {})
        cut = submodel(checkpoint.layout, "custom", fields or {}, trained=False)
    config = stock.child_config(checkpoint.layout, cut.config)
    with atomic_folder(Path(target), overwrite) as folder:
        child = checkpoint.layout.sizes_of(cut.config)
        write_tensors(folder, checkpoint.tensors(child), max_shard_size)
        write_json(folder / "config.json", stock.config_json(config))
        (folder / "README.md").write_text(
            card.of_slice(checkpoint.path.name, cut, checkpoint.space), "utf-8"
        )
        copy_companions(checkpoint.path, folder)
    return cut
