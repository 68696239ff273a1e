"""Records from JSONL, saved data sets, parquet and the hub: alike whatever they are kept in."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from star_elastic.records import Record
from star_elastic.sources import open_records

ROWS = [{"question": f"{n}+1=", "answer": f"so\n#### {n + 1}", "task": "sum"} for n in range(5)]
RECORDS = [Record(r["question"], r["answer"], "sum", str(n + 1)) for n, r in enumerate(ROWS)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that the library writes beside parquet files go to the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def table(rows: list[dict[str, Any]] = ROWS) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def saved(folder: Path) -> Path:
    table().save_to_disk(folder)
    return folder


def saved_splits(folder: Path) -> Path:
    datasets.DatasetDict(train=table(), test=table(ROWS[:2])).save_to_disk(folder)
    return folder


def parquet(folder: Path) -> Path:
    folder.mkdir()
    table().to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def parquet_folder(folder: Path) -> Path:
    folder.mkdir()
    table(ROWS[:3]).to_parquet(folder / "train-0.parquet")
    table(ROWS[3:]).to_parquet(folder / "train-1.parquet")
    table(ROWS[:2]).to_parquet(folder / "test-0.parquet")
    return folder


def json_lines(folder: Path) -> Path:
    folder.mkdir()
    table().to_json(folder / "rows.jsonl")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("made", [saved, saved_splits, parquet, parquet_folder, json_lines])
def test_the_same_records_wherever_they_are_kept(tmp_path: Path, made: Any) -> None:
    records = open_records(str(made(tmp_path / "data")))
    assert len(records) == 5
    assert list(records) == RECORDS
    assert records[-1] == RECORDS[-1]
    assert list(records[1:4:2]) == RECORDS[1:4:2]
    with pytest.raises(IndexError):
        records[5]


@pytest.mark.parametrize("made", [saved_splits, parquet_folder])
def test_splits_are_chosen_by_name(tmp_path: Path, made: Any) -> None:
    path = str(made(tmp_path / "data"))
    assert list(open_records(path, "test")) == RECORDS[:2]
    with pytest.raises(ValueError, match="data: split validation: ") as error:
        open_records(path, "validation")
    assert "\n" not in str(error.value)


def test_conversations_come_as_they_are(tmp_path: Path) -> None:
    """A table gives every message the same columns; those it lacks are None."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "x"}]
    table([{"messages": turns, "text": None}, {"text": "abc"}]).to_parquet(tmp_path / "a.parquet")
    first, second = open_records(str(tmp_path / "a.parquet"))
    assert first == Record("", "a", "text", "a", tuple(turns))
    assert second == Record("", "abc", "text", "abc")


def test_rows_that_are_no_records_are_named(tmp_path: Path) -> None:
    table([{"words": "a"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: row 0: not a record: KeyError\('text'\)$"):
        open_records(str(tmp_path / "a.parquet"))
    table([{"text": "a"}, {"text": None}]).to_parquet(tmp_path / "b.parquet")
    records = open_records(str(tmp_path / "b.parquet"))
    assert records[0].completion == "a"
    with pytest.raises(ValueError, match=r"b\.parquet: row 1: not a record"):
        records[-1]


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet: .*no data") as error:
        open_records(str(tmp_path / "none.parquet"))
    assert "\n" not in str(error.value)


def test_a_part_of_a_split_can_be_had(tmp_path: Path) -> None:
    for made in (parquet, parquet_folder):
        path = str(made(tmp_path / made.__name__))
        assert list(open_records(path, "train[1:3]")) == RECORDS[1:3]


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "./none", "a/b/none", "none/"])
def test_a_path_where_nothing_is(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    with pytest.raises(ValueError, match=f"^{path}: .*[Nn]o such file") as error:
        open_records(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: split train: ") as error:
        open_records(str(tmp_path / "a.parquet"))
    assert "\n" not in str(error.value)


def test_a_folder_with_code_does_not_run_it(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="code: split train: "):
        open_records(str(folder))
    assert not (tmp_path / "ran").exists()


def test_without_the_library_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(parquet(tmp_path / "data"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install star-elastic\[datasets\]$"):
        open_records(path)
    assert len(open_records(str(json_lines_of(tmp_path / "a.jsonl")))) == 1


def json_lines_of(path: Path) -> Path:
    path.write_text('{"text": "a"}\n')
    return path


@pytest.mark.parametrize("name", ["owner/name", "owner/name:main"])
def test_a_hub_id_that_cannot_be_reached(tmp_path: Path, name: str) -> None:
    code = f"from star_elastic.sources import open_records; open_records({name!r})"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=offline, timeout=120
    )
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: {name}: split train: ")
