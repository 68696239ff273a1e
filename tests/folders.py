"""Elastic folders on disk, and ways to spoil them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDINGS = "backbone.embeddings.weight"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_elastic(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(folder / "config.json", lambda config: change(config["elastic_config"]))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a file, and drop the digests, which would tell."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_elastic(folder, lambda declared: declared.update(digests={}))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    edit_elastic(folder, lambda declared: declared.update(digests={}))


def refused(folder: Path, *named: str) -> None:
    """Opening it is an error of one line that names these."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    message = str(error.value).replace(str(folder.parent), "")  # it holds the test's own name
    assert "\n" not in message
    for each in named:
        assert each in message, message


def stock_load(folder: Path) -> PreTrainedModel:
    """What a user without this package gets; nothing may be missing or re-initialised."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    return model.eval()
