"""A size of a checkpoint as an engine wants it: the values of its config, and its tensors.

Both are what the folder that `slice` writes would hold, and come from the same plan; no folder is
written.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_elastic.budget import parse_field
from star_elastic.checkpoint import Checkpoint
from star_elastic.slicing import custom, plan
from star_elastic.submodel import Fields, Submodel

if TYPE_CHECKING:
    from torch import Tensor

KEY = "elastic_size"  # in `--hf-overrides`, and on the config that vLLM makes of them


def size_in(overrides: Any) -> str | None:
    """The size that `--hf-overrides` ask for, if they do.

    Raises:
        ValueError: it is neither a name nor fields.
    """
    wanted = overrides.get(KEY) if isinstance(overrides, Mapping) else None
    if wanted is not None and not isinstance(wanted, str):
        raise ValueError(f"{KEY} = {wanted!r}: not a size's name, nor field=number,...")
    return wanted


def open_at(model: str | Path, revision: str | None, check_digests: bool) -> Checkpoint:
    """The checkpoint of a folder or of a hub id.

    Raises:
        CheckpointError: see `Checkpoint.open`.
    """
    is_local = revision is None or Path(model).exists()
    return Checkpoint.open(model if is_local else f"{model}@{revision}", check_digests)


def choose(checkpoint: Checkpoint, wanted: str) -> Submodel:
    """A size by its name, or by fields: `hidden_size=96,num_hidden_layers=12`.

    Raises:
        CheckpointError: no such name; lists those there are.
        ValueError: a size this parent cannot hold.
    """
    if "=" not in wanted:  # which no name contains
        return checkpoint.size(wanted)
    return custom(checkpoint, dict(parse_field(text.strip(), KEY) for text in wanted.split(",")))


def config_values(checkpoint: Checkpoint, size: Submodel) -> dict[str, Any]:
    """The `config.json` of a size; what `hf_quant_config.json` says is in it.

    Raises:
        ValueError: the stock class cannot express it, or it cuts inside a block of codes.
    """
    planned = plan(checkpoint, size)
    if planned.quantization is None:
        return planned.config
    return {"quantization_config": planned.quantization, **planned.config}


def tensors_of(checkpoint: Checkpoint, fields: Fields) -> "Iterator[tuple[str, Tensor]]":
    """The tensors of a size by their names on disk, one at a time, read from the parent's files.

    Raises:
        CheckpointError: a file that is not the one opened, or cannot be read.
        ValueError: a size this parent cannot hold.
    """
    size = custom(checkpoint, fields)
    return checkpoint.tensors(checkpoint.layout.sizes_of(size.config))
