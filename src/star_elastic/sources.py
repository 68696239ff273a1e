"""Records from wherever they are kept: JSONL files, or what the `datasets` library reads."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from star_elastic.folder import one_line
from star_elastic.records import Record, read_records, to_record

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def open_records(path: str, split: str = "train") -> Sequence[Record]:
    """The records of a .jsonl or .json file of lines, a data set's folder, parquet, or a hub id.

    Args:
        path: a file; a folder of `save_to_disk` or of parquet files; `owner/name` on the hub, or
            `owner/name:configuration`.
        split: the part of a data set that has several; a JSONL file or a single table has one.

    Raises:
        ValueError: one line that names the path, and what cannot be read there.
    """
    if path.endswith((".jsonl", ".json")):
        try:
            return read_records(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not readable: {one_line(error)}") from None
    try:
        rows = _load(path, split)
    except ImportError:
        reason = "reading it takes a library: pip install star-elastic[datasets]"
        raise ValueError(f"{path}: {reason}") from None
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"{path}: split {split}: {one_line(error)}") from None
    return _Rows(path, rows)


def _load(path: str, split: str) -> Any:
    import datasets

    folder = Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(path)
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    if folder.is_dir():
        return datasets.load_dataset(path, split=split)
    if folder.is_file():
        files = {split.partition("[")[0]: path}
        return datasets.load_dataset("parquet", data_files=files, split=split)
    if not _HUB_ID.fullmatch(path) or path.endswith(".parquet"):
        raise FileNotFoundError("no such file or folder")
    name, _, configuration = path.partition(":")
    return datasets.load_dataset(name, configuration or None, split=split)


class _Rows(Sequence[Record]):
    """The rows of a table, made records when they are asked for."""

    def __init__(self, path: str, rows: Any):
        self._path = path
        self._rows = rows
        if not len(rows):
            raise ValueError(f"{path}: no records")
        self[0]  # columns that make no record are told at once, not at a random step

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = range(len(self))[place]
        try:
            return to_record(self._rows[row])
        except ValueError as error:
            raise ValueError(f"{self._path}: row {row}: not a record: {error}") from None
