"""Settings that must be in place before a test imports transformers."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# One thread per operation, in processes that tests start, too: on models this small more threads
# only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
# Where transformers would copy and run a folder's own code; a test watches it.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
os.environ["HF_HUB_OFFLINE"] = "1"
# Shells start background jobs with SIGINT ignored, and children inherit that: tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic folder of one file."""
    from models import elastic

    folder = tmp_path_factory.mktemp("written") / "elastic"
    elastic("nemotron_h").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import elastic

    from star_elastic import tensors

    folder = tmp_path_factory.mktemp("sharded") / "elastic"
    model = elastic("nemotron_h")
    tensors.write(folder, model.state, model.layout, model.space, max_shard_size=20_000)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "elastic"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "elastic"))
