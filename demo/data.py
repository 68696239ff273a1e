"""Training and held-out JSONL for the demonstration: generated problems, or a user's own file."""

import random
from pathlib import Path

from demo import problems


def data_files(
    data: Path | None, out: Path, train_records: int, heldout_records: int
) -> tuple[Path, Path]:
    """Training and held-out JSONL: a user's file split in two, or generated problems.

    Of a user's file at most a tenth is held out.
    """
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    train_path, heldout_path = folder / "train.jsonl", folder / "heldout.jsonl"
    if data is None:
        for path, count, split in (
            (train_path, train_records, "train"),
            (heldout_path, heldout_records, "heldout"),
        ):
            problems.write_jsonl(path, problems.make_problems(count, split, seed=0))
    else:
        lines = data.read_text("utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(lines)
        kept = min(heldout_records, len(lines) // 10)
        heldout_path.write_text("".join(lines[:kept]), "utf-8")
        train_path.write_text("".join(lines[kept:]), "utf-8")
    return train_path, heldout_path
