"""Routers nobody vouches for: what the metadata claim is held against the file before it costs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import answers
from models import layout_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_router import router

from star_elastic.train.router import load_router, save_router


def described(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda router: router.update(changes)


def settings(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda router: router["settings"].update(changes)


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no-budgets": (lambda router: router.pop("budgets"), "no 'budgets' in its metadata"),
    "no-metric": (lambda router: router.pop("metric"), "no 'metric' in its metadata"),
    "budgets-number": (described(budgets=1), "not the router of this parent"),
    "budgets-text": (described(budgets="abc"), "not the router of this parent"),
    "budgets-above-1": (described(budgets=[2.0, 0.7, 0.4]), "are no shares of the parent"),
    "budget-nan": (described(budgets=[1.0, float("nan"), 0.4]), "not the router of this parent"),
    "million-budgets": (described(budgets=[0.5] * 10**5), "networks.hidden_size.0.weight: (32, 3)"),
    "another-order": (described(layer_order=[0, 1]), "its layer_order is not the checkpoint's"),
    "width-2^40": (settings(width=2**40), f"(32, 3), expected ({2**40}, 3)"),
    "width-0": (settings(width=0), "greater than or equal to 1"),
    "unknown-setting": (settings(script="x"), "Extra inputs are not permitted"),
    "unknown-axis": (settings(axes={"head_dim": [4]}), "networks.head_dim.0.weight: missing"),
    "many-choices": (settings(axes={"hidden_size": [24] * 9999}), "9999 choices; at most 4096"),
    "layers-of-no-axis": (settings(per_layer=["head_dim"]), "'head_dim' is not among router.axes"),
    "many-layers": (settings(per_layer=["head_dim"] * 99), "per_layer: more entries than axes"),
    "unknown-metric": (described(metric={"kind": "luck"}), "not the router of this parent"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_router_that_lies(tmp_path: Path, name: str) -> None:
    change, named = LIES[name]
    path = tmp_path / "router.safetensors"
    save_router(router("llama"), path)
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["router"])
    change(said)
    save_file(load_file(path), path, metadata={"router": json.dumps(said)})
    with answers(tmp_path, "router.safetensors: ", named):
        load_router(path, layout_of("llama"))


def terabyte(path: Path) -> None:
    """Of nothing: the file is sparse."""
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "a link out of its folder"),
        (lambda path: path.write_bytes(b"\0" * 16), "does not begin with {"),
        (lambda path: path.write_bytes(b""), "header of 0 bytes in a file of 0"),
        (lambda path: path.write_bytes(b"\xff" * 99), "bytes in a file of 99"),
        (terabyte, "1099511627776 bytes; at most 16777216 are read"),
    ],
    ids=["pipe", "zeros", "no-header", "empty", "header-past-the-end", "terabyte"],
)
def test_a_router_that_is_none(tmp_path: Path, make: Callable[[Path], Any], named: str) -> None:
    path = tmp_path / "router.safetensors"
    make(path)
    with answers(tmp_path, "router.safetensors: ", named):
        load_router(path, layout_of("llama"))
