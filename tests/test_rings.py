"""A core and rings: every byte of the parent in one place, and every size out of them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from codes import quantize
from folders import EMBEDDINGS, edit_elastic, edit_json, edit_tensors, stock_load
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import FAMILIES, elastic, logits, token_ids
from test_layout import nano
from torch import ones
from typer.testing import CliRunner, Result

from star_elastic import tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.cli import build_app
from star_elastic.corner import Bytes
from star_elastic.dtypes import STORED_ITEMSIZE
from star_elastic.folder import CheckpointError, Stored
from star_elastic.folder.header import Spec, header_bytes
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.rings import pack, unpack
from star_elastic.rings.assemble import Assembler
from star_elastic.rings.chain import check_chain, extents, partition
from star_elastic.slicing import slice_checkpoint
from star_elastic.submodel import ElasticSpace, Submodel, check_fields, submodel

HOME = TemporaryDirectory(prefix="rings-")  # removed with this module
SHARD = 9_000  # bytes: several files of each kind


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def saved(model: ElasticModel, folder: Path, max_shard_size: int = 20_000) -> Checkpoint:
    tensors.write(folder, model.state, model.layout, model.space, max_shard_size=max_shard_size)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "LICENSE.txt").write_text("do as you like")
    (folder / "tokenizer.json").write_text("{}")
    return Checkpoint.open(folder)


@cache
def opened(family: str) -> Checkpoint:
    return saved(elastic(family), Path(HOME.name) / family / "elastic")


@cache
def packed(family: str) -> Path:
    folder = Path(HOME.name) / family / "packed"
    pack(opened(family), folder, max_shard_size=SHARD)
    return folder


@cache
def choices(family: str, field: str) -> list[int]:
    layout = opened(family).layout
    found = []
    for value in range(1, layout.sizes[field] + 1):
        try:
            check_fields(layout, {field: value})
            found.append(value)
        except ValueError:
            continue
    return found


def chains(family: str, draw: Callable[..., Any]) -> list[Submodel]:
    """Two or three sizes, every field at random."""
    layout = opened(family).layout
    count = draw(st.integers(1, 2))
    drawn = {
        field: sorted(draw(st.sampled_from(choices(family, field))) for _ in range(count))
        for field in layout.axes
    }
    fields = [{field: values[n] for field, values in drawn.items()} for n in range(count)]
    try:
        sizes = [submodel(layout, f"s{n}", each, True) for n, each in enumerate([*fields, {}])]
        check_chain(layout, sizes)
    except ValueError:
        assume(False)
        raise
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_core_and_rings_are_a_partition_of_every_tensor(family: str, data: st.DataObject) -> None:
    checkpoint, sizes = opened(family), chains(family, data.draw)
    for stop in range(1, len(sizes) + 1):
        chain = [checkpoint.layout.sizes_of(size.config) for size in sizes[:stop]]
        parts = partition(checkpoint, chain)
        kept = dict(checkpoint.layout.kept(chain[-1], checkpoint.weights))
        assert parts.keys() == {weight.name for weight in kept.values()}
        for name, tensor in parts.items():
            shape = checkpoint.weights[name].shape(chain[-1])
            row = tensor[-1][0].row if tensor[-1] else next(p[0].row for p in tensor if p)
            count = np.zeros((int(np.prod(shape)) * 4 // row, row), np.uint8)
            for corner in (corner for part in tensor for corner in part):
                mark = np.zeros_like(count)
                corner.put(mark, 0, np.ones(corner.bytes, np.uint8))
                count += mark
            assert (count == 1).all(), name
        for number, child in enumerate(chain):
            whole = checkpoint.disk_bytes(child)
            smaller = checkpoint.disk_bytes(chain[number - 1]) if number else 0
            added = sum(c.bytes for tensor in parts.values() for c in tensor[number])
            assert added == whole - smaller


class Memory:
    """Bytes in the place of a file."""

    def __init__(self, data: Bytes):
        self.data = data

    def fill(self, buffer: memoryview) -> None:
        buffer[:] = self.data[: len(buffer)].data
        self.data = self.data[len(buffer) :]


@pytest.mark.parametrize("block", [1, 5, 64, 1000, 10**6])
def test_blocks_of_any_length_give_the_same_tensor(block: int) -> None:
    """Rows longer than a block too; cuts inside groups of heads."""
    checkpoint = opened("nemotron_h")
    sizes = [checkpoint.layout.sizes_of(checkpoint.size(n).config) for n in ("small", "full")]
    name = "backbone.layers.2.mixer.in_proj.weight"
    assert name in checkpoint.stored
    tensor = partition(checkpoint, sizes)[name]
    size = sum(corner.bytes for part in tensor for corner in part)
    whole = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    sources: list[Any] = []
    for corner in (corner for part in tensor for corner in part):
        pieces = [piece.reshape(-1) for piece in corner.cut(whole.reshape(-1, corner.row), 0)]
        sources.append((corner, Memory(np.concatenate(pieces))))
    assert len(sources) == 3
    written = bytearray()
    Assembler(block).write(sources, size, lambda data: written.extend(data))
    assert bytes(written) == whole.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parent_comes_back_byte_for_byte(family: str, tmp_path: Path) -> None:
    unpack(packed(family), "full", tmp_path / "out")
    assert files(tmp_path / "out") == files(opened(family).path)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["small", "prefix"])
def test_a_size_is_what_slice_gives(family: str, size: str, tmp_path: Path) -> None:
    """Depth, experts, heads within their groups: every file the same."""
    slice_checkpoint(opened(family), tmp_path / "slice", size, max_shard_size=SHARD)
    unpack(packed(family), size, tmp_path / "out", max_shard_size=SHARD)
    assert files(tmp_path / "out") == files(tmp_path / "slice")


def test_stock_transformers_loads_the_core_as_it_is() -> None:
    folder, ids = packed("nemotron_h"), token_ids()
    stock = stock_load(folder / "core")
    expected = elastic("nemotron_h")["small"]
    assert logits(stock, ids).equal(logits(expected, ids))
    assert {"LICENSE", "LICENSE.txt", "tokenizer.json"} <= files(folder / "core").keys()


def test_no_byte_is_stored_twice() -> None:
    """Beyond headers, indices and cards: weights once, companions once (but in the core)."""
    checkpoint, folder = opened("nemotron_h"), packed("nemotron_h")
    weights = [path for path in folder.rglob("*.safetensors")]
    held = 0
    for path in weights:
        with path.open("rb") as file:
            held += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    assert held == checkpoint.disk_bytes()
    assert [path.parent.name for path in folder.rglob("tokenizer.json")] == ["core"]


def test_at_the_scale_of_nano_headers_are_a_thousandth_at_most() -> None:
    published = nano()
    layout = Layout(published.config)
    sizes = {
        "12b": {"hidden_size": 1920, "moe_intermediate_size": 960},
        "23b": {"hidden_size": 2304, "moe_intermediate_size": 1536},
        "full": {},
    }
    space = ElasticSpace.of(layout, sizes, trained=True)
    stored, end = {}, 0
    for name, weight in layout.stored.items():
        size = int(np.prod(weight.shape(layout.sizes))) * STORED_ITEMSIZE["BF16"]
        stored[name] = Stored("f", "BF16", weight.shape(layout.sizes), end, end := end + size)
    parent = Checkpoint(Path(), layout.config, layout, space, stored, layout.stored, True)
    chain = [layout.sizes_of(fields) for fields in sizes.values()]
    parts = partition(parent, chain)
    lean = [Spec(name, each.dtype, each.shape) for name, each in stored.items()]
    beside = 3 * len(json.dumps({name: "model-00001-of-00013.safetensors" for name in stored}))
    overhead = 2 * len(header_bytes(lean)) + beside  # the parent's and the core's, three indices
    held = 0
    for number in range(3):
        counts = extents(parent, parts, number)
        held += 2 * sum(counts.values())
        overhead += len(header_bytes([Spec(name, "BF16", (n,)) for name, n in counts.items()]))
    assert held == end and 0 <= end - 2 * 31_577_937_344 < 10_000  # buffers
    assert overhead < 0.0002 * end


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "fp8"])
def test_codes_and_scales_come_back(kind: str, tmp_path: Path) -> None:
    """Also the tensors that tell a shape, whose values no smaller size shares."""
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = elastic("llama", hidden_size=32, intermediate_size=32)
    middle = {"hidden_size": 24}
    sizes = {"full": {}, "middle": middle, "small": fields}
    model.space = ElasticSpace.of(model.layout, sizes, trained=True)
    model.save_pretrained(tmp_path / "q")
    quantize(tmp_path / "q", kind)
    checkpoint = Checkpoint.open(tmp_path / "q")
    assert checkpoint.is_quantized
    pack(checkpoint, tmp_path / "packed")
    unpack(tmp_path / "packed", "full", tmp_path / "full")
    assert files(tmp_path / "full") == files(tmp_path / "q")
    for size in ("small", "middle"):
        slice_checkpoint(checkpoint, tmp_path / f"slice-{size}", size)
        unpack(tmp_path / "packed", size, tmp_path / size)
        assert files(tmp_path / size) == files(tmp_path / f"slice-{size}")


def test_tensors_of_no_size_go_with_the_parent(folder: Path, tmp_path: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"mtp.layers.0.norm.weight": ones(32)}))
    pack(Checkpoint.open(folder), tmp_path / "packed", ["small", "full"])
    unpack(tmp_path / "packed", "full", tmp_path / "full")
    assert files(tmp_path / "full") == files(folder)
    assert not [p for p in (tmp_path / "packed/core").iterdir() if b"mtp." in p.read_bytes()]


def test_neither_verb_needs_torch(folder: Path, tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
from star_elastic.checkpoint import Checkpoint
from star_elastic.rings import pack, unpack
source, out = sys.argv[1:]
pack(Checkpoint.open(source), out + "/packed", ["full", "small"])
for size in ("full", "small"):
    unpack(out + "/packed", size, out + "/" + size)
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out/full") == files(folder)


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    def run(*words: object) -> Result:
        return CliRunner().invoke(build_app(), [*map(str, words)])

    done = run("pack", folder, "--out", tmp_path / "p", "--sizes", "small,full")
    assert done.exit_code == 0 and "ring-1-full" in done.stdout, done.output
    done = run("unpack", tmp_path / "p", "--size", "full", "--out", tmp_path / "full")
    assert done.exit_code == 0 and files(tmp_path / "full") == files(folder), done.output
    done = run("unpack", tmp_path / "p", "--size", "prefix", "--out", tmp_path / "none")
    assert isinstance(done.exception, CheckpointError)
    assert str(done.exception).endswith("no size 'prefix'; there are small, full")


@pytest.mark.parametrize(
    ("sizes", "names", "message"),
    [
        ({"a": {"hidden_size": 8}, "b": {"intermediate_size": 8}}, None, "a and b|b and a"),
        ({"a": {"hidden_size": 8}, "b": {"hidden_size": 8}}, None, "sizes a and b are the same"),
        ({"a": {"hidden_size": 8}}, ["a"], "two sizes or more, not 1"),
        ({"a": {"hidden_size": 8}}, ["a", "c"], "no size 'c'; there are full, a"),
        (
            {"a": {"hidden_size": 8}, "b": {"hidden_size": 16}},
            ["a", "b"],
            "size b is not the whole parent: its hidden_size is smaller",
        ),
        ({"a": {"intermediate_size": [8, 24]}}, None, "cannot express intermediate_size"),
        ({"a": {"num_hidden_layers": 1}, "b": {"hidden_size": 8}}, None, "no chain: "),
    ],
)
def test_sizes_that_are_no_chain(
    sizes: Mapping[str, Any], names: list[str] | None, message: str, tmp_path: Path
) -> None:
    model = elastic("llama")
    model.space = ElasticSpace.of(model.layout, {"full": {}, **sizes}, trained=True)
    checkpoint = saved(model, tmp_path / "elastic")
    with pytest.raises(ValueError, match=message):
        pack(checkpoint, tmp_path / "packed", names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elastic"]


def test_a_folder_that_is_there_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    for write in (
        lambda: pack(Checkpoint.open(folder), tmp_path / "out"),
        lambda: unpack(packed("nemotron_h"), "small", tmp_path / "out"),
    ):
        with pytest.raises(FileExistsError):
            write()
    assert files(tmp_path / "out") == {"mine": b"mine"}
    with pytest.raises(ValueError, match="the checkpoint itself"):
        pack(Checkpoint.open(folder), folder, overwrite=True)
    with pytest.raises(ValueError, match="the packed folder itself"):
        unpack(packed("nemotron_h"), "small", packed("nemotron_h"), overwrite=True)


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed("nemotron_h"), tmp_path / "packed"))


def complaint(folder: Path, size: str = "full") -> str:
    target = folder.parent / "out"
    with pytest.raises(CheckpointError) as error:
        unpack(folder, size, target)
    assert not list(folder.parent.glob("*out*"))
    assert "\n" not in str(error.value)
    return str(error.value)


def set_config(manifest: dict[str, Any]) -> None:
    manifest["sizes"][0]["config"]["hidden_size"] += 1


def reverse(manifest: dict[str, Any]) -> None:
    manifest["sizes"][:2] = reversed(manifest["sizes"][:2])


def rename_path(to: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["sizes"][0]["beside"]["config.json"] = to
        manifest["files"][to] = manifest["files"].pop("core/config.json")

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(format_version=2), "format_version: unknown version '2'"),
        (lambda m: m.update(more=1), "more: "),
        (lambda m: m.pop("parent"), "parent: "),
        (lambda m: m["sizes"].pop(), "belongs to no size"),
        (lambda m: m["files"].pop("core/config.json"), "core/config.json is missing"),
        (lambda m: m["files"]["core/config.json"].update(bytes=-1), "bytes: "),
        (lambda m: m["files"]["core/config.json"].update(bytes="9"), "bytes: "),
        (lambda m: m["files"]["core/config.json"].update(sha256="sha256:00"), "sha256: "),
        (rename_path("../config.json"), "config.json: "),
        (rename_path("/etc/passwd"), "config.json: "),
        (rename_path("core/a/config.json"), "config.json: "),
        (rename_path("core/..\\config.json"), "config.json: "),
        (rename_path("core/.."), "config.json: "),
        (rename_path("core/config.json\n"), "config.json: "),
        (lambda m: m["sizes"][0]["beside"].update({"../x": "core/config.json"}), "../x"),
        (lambda m: m["sizes"][1]["beside"].update({"model.safetensors": "core/config.json"}), "be"),
        (lambda m: m["sizes"][0].update(name="full"), "two have the same name"),
        (set_config, "sizes.small.config: the parent has another"),
        (reverse, "sizes prefix and small are no chain"),
    ],
)
def test_a_manifest_that_lies(
    change: Callable[[dict[str, Any]], Any], named: str, spoilt: Path
) -> None:
    edit_json(spoilt / "rings.json", change)
    message = complaint(spoilt)
    assert "rings.json" in message and named in message, message


def test_a_key_twice_and_no_json(spoilt: Path) -> None:
    text = (spoilt / "rings.json").read_text()
    (spoilt / "rings.json").write_text(text.replace("{", '{"parent": {},', 1))
    assert "rings.json: duplicate key 'parent'" in complaint(spoilt)
    (spoilt / "rings.json").write_text("[]")
    assert "rings.json: not a JSON object" in complaint(spoilt)
    (spoilt / "rings.json").unlink()
    assert "rings.json: no such file" in complaint(spoilt)


@pytest.mark.parametrize(
    ("file", "size"),
    [
        ("core/model-00001-of-00007.safetensors", "small"),
        ("ring-1-prefix/model-00001-of-00002.safetensors", "prefix"),
        ("ring-2-full/model-00003-of-00010.safetensors", "full"),
        ("parent/model-00002-of-00009.safetensors.header", "prefix"),
        ("parent/config.json", "full"),
    ],
)
def test_one_bit_of_a_file(file: str, size: str, spoilt: Path) -> None:
    data = bytearray((spoilt / file).read_bytes())
    data[-1] ^= 1
    (spoilt / file).write_bytes(data)
    assert complaint(spoilt, size).endswith(f"{file}: sha256 differs from rings.json")
    (spoilt / file).write_bytes(data[:-1])
    assert f"{file}: {len(data) - 1} bytes; rings.json says" in complaint(spoilt, size)
    (spoilt / file).unlink()
    assert f"{file}: no such file" in complaint(spoilt, size)


def held(folder: Path, path: str) -> dict[str, Any]:
    from star_elastic.folder import digest

    return {"bytes": (folder / path).stat().st_size, "sha256": digest(folder / path)}


@pytest.mark.parametrize("what", ["core", "ring-2-full"])
def test_files_that_do_not_fit_one_another(what: str, tmp_path: Path) -> None:
    """Sound digests, but the tensors of another checkpoint."""
    pack(opened("nemotron_h"), tmp_path / "packed", ["small", "full"])
    other = elastic("nemotron_h", vocab_size=60)
    saved(other, tmp_path / "other")
    pack(Checkpoint.open(tmp_path / "other"), tmp_path / "rings", ["small", "full"])
    folder = {"core": "core", "ring-2-full": "ring-1-full"}[what]
    shutil.rmtree(tmp_path / "packed" / folder)
    shutil.copytree(tmp_path / "rings" / folder, tmp_path / "packed" / folder)

    def change(manifest: dict[str, Any]) -> None:
        for path in manifest["files"]:
            manifest["files"][path] = held(tmp_path / "packed", path)

    edit_json(tmp_path / "packed/rings.json", change)
    message = complaint(tmp_path / "packed")
    assert f"{folder}/model.safetensors: {EMBEDDINGS}: F32" in message, message


def test_what_is_rebuilt_is_held_against_the_parents_digest(spoilt: Path) -> None:
    file = "ring-2-full/model-00003-of-00010.safetensors"
    data = bytearray((spoilt / file).read_bytes())
    data[-1] ^= 1
    (spoilt / file).write_bytes(data)
    edit_json(spoilt / "rings.json", lambda m: m["files"].update({file: held(spoilt, file)}))
    assert "rebuilt, it has another sha256 than rings.json says" in complaint(spoilt)


def test_a_parent_that_changes_meanwhile_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    edit_elastic(folder, lambda declared: None)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        pack(checkpoint, tmp_path / "packed")
    assert not list(tmp_path.glob("*packed*"))
