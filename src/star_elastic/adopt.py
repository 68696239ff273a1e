"""Sizes declared on a nested checkpoint that was made elsewhere. No weight is copied or changed.

Nobody can tell from the weights whether they are nested: that is the publisher's word, and the
table of what publishers said is `PUBLISHED`.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from star_elastic import hub
from star_elastic.checkpoint import QUANTIZATION, Checkpoint, copy_companions, write_card
from star_elastic.folder import (
    INDEX,
    CheckpointError,
    atomic_folder,
    copy_file,
    digest,
    read_json,
    replace_json,
    write_json,
)
from star_elastic.layout import Layout
from star_elastic.slicing import plan
from star_elastic.submodel import ElasticSpace, Fields, Training, check_fields

_KEY = "elastic_config"


@dataclass(frozen=True)
class Published:
    """What a publisher tells of a nested checkpoint: its sizes, and how to know it.

    `name` must be part of the repository's name and `config` of its config: other models that are
    not nested share the config. `missing` is what we found no source for, for people.
    """

    name: str
    config: Mapping[str, int]
    sizes: Mapping[str, Fields]
    missing: str = ""


PUBLISHED = (
    Published(
        # NVIDIA-Nemotron-Labs-3-Elastic-30B-A3B-{BF16,FP8,NVFP4}; plain Nemotron 3 Nano has the
        # very same config. 12B: examples/flextron/teacher_model_config_12b.yaml of the authors'
        # Megatron-LM, which gives the 12.4B parameters (2.1B active) of the model card's 12B-A2.0B.
        name="Nemotron-Labs-3-Elastic-30B-A3B",
        config={"hidden_size": 2688, "moe_intermediate_size": 1856, "num_hidden_layers": 52},
        sizes={"30b": {}, "12b": {"hidden_size": 1920, "moe_intermediate_size": 960}},
        missing="the widths of its 23B size are not published: if you know them, say --size "
        "23b:hidden_size=...,moe_intermediate_size=...; --budget 23b:params=23.6B declares a size "
        "of that many parameters between the two, which is not NVIDIA's",
    ),
)


def name_of(checkpoint: Checkpoint) -> str:
    """What a checkpoint is called: its repository of the hub, or else its folder."""
    return hub.repository(checkpoint.path) or checkpoint.path.resolve().name


def published(checkpoint: Checkpoint) -> Published | None:
    """What is known of a checkpoint of this name and config."""
    name, sizes = name_of(checkpoint).lower(), checkpoint.layout.sizes
    for each in PUBLISHED:
        if each.name.lower() in name and each.config.items() <= sizes.items():
            return each
    return None


def read_order(path: Path) -> list[int]:
    """A layer order from JSON: a list of layers, best first.

    Raises:
        ValueError: no such list in it.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(type(layer) is int for layer in found):
        raise ValueError(f"{path}: not a JSON list of layers, best first")
    return found


def space_of(
    checkpoint: Checkpoint,
    sizes: Mapping[str, Fields],
    between: Mapping[str, Fields] | None = None,
    layer_order: Sequence[int] | None = None,
    multiple_of: Mapping[str, int] | None = None,
) -> ElasticSpace:
    """The declaration of some sizes, every one of which can be sliced.

    Args:
        sizes: those that were trained, as whoever made the checkpoint says.
        between: those that nobody trained.

    Raises:
        ValueError: naming size, field and value that this parent cannot hold.
    """
    between = between or {}
    layout = Layout(checkpoint.config, layer_order)
    everything = {**sizes, **between}
    for name, fields in everything.items():
        with _naming(name):
            check_fields(layout, fields)
    training = Training(recipe=f"adopted from {name_of(checkpoint)}")
    try:
        space = ElasticSpace.of(layout, everything, True, training, multiple_of)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"size {first['input']!r}: {first['msg']}") from None
    submodels = [
        each.model_copy(update={"trained": each.name not in between}) for each in space.submodels
    ]
    space = space.model_copy(update={"submodels": submodels})
    for each in submodels:
        with _naming(each.name):
            plan(replace(checkpoint, layout=layout, space=space), each)
    return space


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors say which of the sizes cannot be."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"size {name}: {error}") from None


def unknown_digests(checkpoint: Checkpoint) -> int:
    """Bytes of weight files that `adopt` has to read for their digests."""
    paths = [checkpoint.path / file for file in _files(checkpoint)]
    return sum(path.stat().st_size for path in paths if hub.known_digest(path) is None)


def adopt(
    checkpoint: Checkpoint,
    space: ElasticSpace,
    out: Path | None = None,
    replaces: bool = False,
    digests: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Checkpoint:
    """Declare sizes: in the checkpoint's own `config.json`, or in a new folder `out` that has the
    same weight files by hard links.

    Raises:
        CheckpointError: it declares sizes already and `replaces` is false; a hub's cache and no
            `out`; a file that cannot be read.
        FileExistsError: `out` exists.
        OSError: `out` is on another file system, or one without hard links.
    """
    refuse(checkpoint, out, replaces)
    layout = Layout(checkpoint.config, space.layer_order)
    if out is None:
        if digests:
            space = _with_digests(checkpoint, space, progress)
        values = _declaring(checkpoint, space)
        replace_json(checkpoint.path / "config.json", values, sort=False)
        write_card(checkpoint.path, layout, space)
        return Checkpoint.open(checkpoint.path, check_digests=False)
    with atomic_folder(out) as folder:
        for file in _files(checkpoint):
            _link(checkpoint.path / file, folder / file, out)
        if digests:
            space = _with_digests(checkpoint, space, progress)
        _write_beside(checkpoint, folder, _declaring(checkpoint, space))
        write_card(folder, layout, space)
    return Checkpoint.open(out, check_digests=False)


def refuse(checkpoint: Checkpoint, out: Path | None, replaces: bool) -> None:
    """Refuse what `adopt` would not do, before any size is counted; see there."""
    if checkpoint.is_elastic and not replaces:
        names = ", ".join(checkpoint.space.sizes)
        raise CheckpointError(f"{checkpoint.path}: declares sizes already ({names}): say --replace")
    if out is None and hub.repository(checkpoint.path) is not None:
        raise CheckpointError(
            f"{checkpoint.path}: is in the cache of the hub, which stays as it is: say --out DIR "
            "(its weights will be hard links: no copies)"
        )


def refuse_early(path: str, out: Path | None) -> None:
    """Refuse what is clear from the names, before a download of 60 GB; see `adopt`."""
    if out is None and not Path(path).exists():
        raise CheckpointError(
            f"{path}: no such folder; a repository of the hub wants --out DIR, as its cache stays "
            "as it is (the weights will be hard links: no copies)"
        )
    if out is not None and os.path.lexists(out):
        raise FileExistsError(errno.EEXIST, "exists already; choose another folder", str(out))


def _declaring(checkpoint: Checkpoint, space: ElasticSpace) -> dict[str, Any]:
    """Their `config.json`, every key in its place, and the declaration at its end."""
    values = read_json(checkpoint.path / "config.json")
    values.pop(_KEY, None)
    return {**values, _KEY: space.model_dump()}


def _with_digests(
    checkpoint: Checkpoint, space: ElasticSpace, progress: Callable[[int], None] | None
) -> ElasticSpace:
    paths = [checkpoint.path / file for file in _files(checkpoint)]
    found = {path.name: hub.known_digest(path) or digest(path, progress) for path in paths}
    return space.model_copy(update={"digests": found})


def _files(checkpoint: Checkpoint) -> list[str]:
    """The weight files."""
    return sorted({each.file for each in checkpoint.stored.values()})


def _write_beside(checkpoint: Checkpoint, folder: Path, values: Mapping[str, Any]) -> None:
    """Everything but weights. Remote code does not travel, so that nothing may name it."""
    kept = {key: value for key, value in values.items() if key != "auto_map"}
    write_json(folder / "config.json", kept, sort=False)
    for name in (INDEX, QUANTIZATION):
        if (checkpoint.path / name).is_file():
            copy_file(checkpoint.path, name, folder / name)
    copy_companions(checkpoint.path, folder)


def _link(source: Path, target: Path, out: Path) -> None:
    """One more name for a weight file.

    Raises:
        OSError: there can be none here; a copy would be 60 GB that nobody asked for.
    """
    real = source.resolve(strict=True)
    try:
        os.link(real, target)
    except OSError as error:
        message = (
            f"no hard link to {real} can be made here ({error.strerror}), and nothing is copied"
        )
        raise OSError(error.errno, message, str(out)) from None
