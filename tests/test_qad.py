"""Training for codes: what runs is what slicing the quantized checkpoint gives (I5), and a run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from codes import NAMES, form_of, meaning
from folders import edit_elastic, edit_json, stock_load
from models import letters_tokenizer, logits, same, token_ids
from safetensors.torch import load_file, save_file
from test_processes import Press, alike
from test_processes import run as run_two
from test_quantize import SMALL, WEIGHTS, parent_of, quantized
from torch import Tensor
from training import one_batch
from transformers import AutoConfig

from star_elastic import stock, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.precision import Format, INT8Groups
from star_elastic.precision import quantized as chosen_of
from star_elastic.quantize import make_plan, quantize_checkpoint
from star_elastic.slicing import slice_checkpoint
from star_elastic.submodel import ElasticSpace
from star_elastic.train.coded import Coding
from star_elastic.train.distillation import loss, predicting
from star_elastic.train.distributed import World
from star_elastic.train.draws import Draws
from star_elastic.train.interrupt import Interrupted
from star_elastic.train.load import load_parts
from star_elastic.train.parts import Parts, Skeletons
from star_elastic.train.recipe import Distil, load_recipe
from star_elastic.train.run import train
from star_elastic.train.teacher import Teacher

ROUTER = "router.safetensors"


def coding(opened: Checkpoint, form: Format, keep: list[str] | None = None) -> Coding:
    layout = opened.layout
    stored = {name: tensors.dtype_of(opened, weight) for name, weight in layout.weights.items()}
    return Coding(layout, [form], chosen_of(layout, keep or []).values(), stored)


@torch.no_grad()
def said(parts: Parts, made: Coding, fields: dict[str, int], ids: Tensor) -> Tensor:
    """The logits of the training forward at a size."""
    finish = torch.nn.functional.linear
    return parts(parts.skeleton(fields).eval(), made.cut(fields), finish, input_ids=ids)


def decoded(folder: Path) -> Any:
    """A stock model of a quantized slice, in float32, on the weights that its codes stand for."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config.dtype, plain = torch.float32, folder / "plain"
    config.save_pretrained(plain)
    found = meaning(load_file(folder / WEIGHTS))
    save_file(
        {name: tensor.float() for name, tensor in found.items()},
        plain / WEIGHTS,
        metadata={"format": "pt"},
    )
    return stock.use_chunk_scan(stock.mend(stock_load(plain)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe", "llama"])
def test_what_is_trained_is_what_is_sliced(
    family: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = parent_of(family, tmp_path / "plain", dtype)
    coded = quantized(plain, tmp_path / "coded", name)
    parts, made = load_parts(plain, World(), torch.float32), coding(plain, form_of(name))
    for size, fields in {"full": {}, "small": SMALL[family]}.items():
        slice_checkpoint(coded, tmp_path / size, size=size)
        expected = logits(decoded(tmp_path / size), token_ids())
        found = said(parts, made, fields, token_ids())
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        numbers = logits(ElasticModel.from_pretrained(plain.path, torch.float32)[size], token_ids())
        assert (found - numbers).abs().max() > 1e-3


def test_what_is_kept_stays(tmp_path: Path) -> None:
    """Some of the experts' fused matrices, and some not; a layer that is no size's first."""
    plain, form = parent_of("qwen3_moe", tmp_path / "plain"), form_of("nvfp4")
    keep = ["*.experts.2.*", "*.experts.*.gate_proj", "*.layers.0.self_attn.*"]
    quantize_checkpoint(make_plan(plain, form, keep), tmp_path / "coded")
    coded = Checkpoint.open(tmp_path / "coded")
    slice_checkpoint(coded, tmp_path / "small", size="small")
    parts = load_parts(plain, World(), torch.float32)
    found = said(parts, coding(plain, form, keep), SMALL["qwen3_moe"], token_ids())
    expected = logits(decoded(tmp_path / "small"), token_ids())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
def test_gradients_are_those_at_the_decoded_weights(family: str, tmp_path: Path) -> None:
    """Straight through: as if the decoded weights were the parent's own."""
    plain = parent_of(family, tmp_path / "plain", torch.float32)
    made, fields = coding(plain, form_of("nvfp4")), SMALL[family]
    state = {name: t.clone() for name, t in tensors.in_memory(plain, plain.layout.weights.values())}
    whole = made.cut({})
    for layer in (None, *range(len(plain.layout.blocks))):
        there = {n: t for n, t in state.items() if plain.layout.weights[n].layer == layer}
        state |= whole.tensors(layer, there)
    seen = []
    for held, cut in ((load_parts(plain, World()).tensors(), made.cut), (state, None)):
        learned = {n: t.detach().clone() for n, t in held.items()}
        learned = {
            n: t if plain.layout.weights[n].is_buffer else torch.nn.Parameter(t)
            for n, t in learned.items()
        }
        parts = Parts(plain.layout, learned)
        skeleton, made_cut = Skeletons(parts, cut).of(fields)
        out = parts(skeleton, made_cut, torch.nn.functional.linear, input_ids=token_ids())
        out.square().sum().backward()
        seen.append({n: t.grad for n, t in learned.items() if t.grad is not None})
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 10
    for name, expected in seen[1].items():
        torch.testing.assert_close(seen[0][name], expected, atol=1e-4, rtol=1e-4, msg=name)


def test_each_size_learns_from_its_own(tmp_path: Path) -> None:
    """Before any step: nothing to learn for a size without codes, all of it from the parent."""
    plain = parent_of("nemotron_h", tmp_path / "plain", torch.float32)
    parts, batch = load_parts(plain, World(), torch.float32), one_batch()
    own, full = (Teacher(load_parts(plain, World()), own=own) for own in (True, False))
    fields = SMALL["nemotron_h"]
    skeleton, cut = Skeletons(parts).of(fields)
    lessons = {"own": own.lesson(batch, fields), "full": full.lesson(batch, fields)}
    assert lessons["own"].hidden.shape[1] == 32 and lessons["full"].hidden.shape[1] == 64
    with torch.no_grad():
        hidden, head = parts(skeleton.eval(), cut, lambda *found: found, **batch.inputs)
    torch.testing.assert_close(predicting(hidden, batch.targets), lessons["own"].hidden)
    assert torch.equal(head, lessons["own"].head)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic parent in BF16 with a tokenizer and a router, data, and a recipe."""
    folder = tmp_path_factory.mktemp("qad")
    parent_of("nemotron_h", folder / "parent")
    letters_tokenizer().save_pretrained(folder / "parent")
    (folder / "parent" / ROUTER).write_bytes(b"a router")
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(folder / "data.jsonl")
    stage = {"steps": 12, "sequence_length": 24, "rows": 1, "accumulate": 2}
    values = {
        "parent": str(folder / "parent"),
        "data": {"train": data, "heldout": data},
        "quantize": {"format": "nvfp4", "keep": ["attention"], "teacher": "own"},
        "train": {
            "stages": [stage | {"learning_rate": 5e-4, "warmup_steps": 2}],
            "same_size": 2,
            "between": 0.3,
            "save_every": 4,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_a_run_teaches_the_codes(folder: Path, tmp_path: Path) -> None:
    """Order, sizes, dtype, router and tokenizer stay; what is written is then quantized."""
    heard: list[str] = []
    train(load_recipe(folder / "recipe.yaml"), tmp_path / "out", say=heard.append)
    assert not (tmp_path / "out/sorted").exists() and "time: about" in heard[-1]
    before, after = (Checkpoint.open(p) for p in (folder / "parent", tmp_path / "out/elastic"))
    assert {name: size.config for name, size in after.space.sizes.items()} == {
        "full": {},
        "small": SMALL["nemotron_h"],
    }
    assert after.space.axes == before.space.axes and after.layout.layer_order is not None
    assert after.layout.layer_order == before.layout.layer_order
    assert {name: t.dtype for name, t in after.stored.items()} == {
        name: t.dtype for name, t in before.stored.items()
    }
    assert after.space.digests.keys() == {WEIGHTS, ROUTER}
    assert (after.path / ROUTER).read_bytes() == b"a router"
    assert (after.path / "tokenizer_config.json").is_file()
    assert after.space.training is not None and after.space.training.steps == 12
    assert after.space.training.recipe == "recipe for nvfp4, keeping attention"
    losses = [json.loads(line)["losses"] for line in (tmp_path / "out/metrics.jsonl").open()]
    assert {name for step in losses for name in step} == {"full", "small", "between"}
    assert kl(after, before) < 0.7 * kl(before, before)
    quantized(after, tmp_path / "coded", "nvfp4")


def kl(
    opened: Checkpoint,
    teacher: Checkpoint,
    form: Format | None = None,
    keep: Sequence[str] = ("attention",),
) -> float:
    """What a size loses as codes, to its own numbers before."""
    made, batch = coding(opened, form or form_of("nvfp4"), [*keep]), one_batch()
    lesson = Teacher(load_parts(teacher, World()), own=True).lesson(batch, SMALL["nemotron_h"])
    parts = load_parts(opened, World(), torch.float32)
    skeleton, cut = Skeletons(parts, made.cut).of(SMALL["nemotron_h"])
    with torch.no_grad():
        hidden, head = parts(skeleton, cut, lambda *found: found, **batch.inputs)
    labels = batch.input_ids[:, 1:][batch.targets[:, 1:]]
    return loss(predicting(hidden, batch.targets), head, labels, lesson, Distil()).item()


def test_stopped_and_resumed_is_never_stopped(folder: Path, tmp_path: Path) -> None:
    """I8, bit for bit."""
    plan = load_recipe(folder / "recipe.yaml")
    train(plan, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(plan, tmp_path / "out", callbacks=[Press(5)])
    train(plan, tmp_path / "out", resume=True)
    found, expected = (load_file(tmp_path / n / "elastic" / WEIGHTS) for n in ("out", "whole"))
    same(found, expected)


def test_codes_of_eight_bits_learn_to_be_read_at_four(folder: Path, tmp_path: Path) -> None:
    """Both readings are drawn, by the seed and the position alone; each learns."""
    bits = "quantize={format: int8, group: 16, bits: [8, 4], teacher: own}"
    plan = load_recipe(
        folder / "recipe.yaml",
        [bits, "train.stages.0.steps=80", "train.stages.0.learning_rate=1.0e-3"],
    )
    assert plan.quantize is not None and len(plan.quantize.readings) == 2
    out = train(plan, tmp_path / "out")
    before, after = Checkpoint.open(folder / "parent"), Checkpoint.open(out)
    assert kl(after, before, INT8Groups(16, 4), []) < 0.9 * kl(
        before, before, INT8Groups(16, 4), []
    )
    assert after.space.training is not None
    assert "int8 in groups of 16, read at 8 and 4 bits" in after.space.training.recipe
    draws = Draws(before.layout, plan.train, {}, {}, 2)
    drawn = [draws.reading(n) for n in range(40)]
    assert set(drawn) == {0, 1} and drawn[::2] == drawn[1::2]  # `same_size` is 2


def test_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    """I7: whole matrices exist in a part's forward only, and their scales are made there."""
    parent_of("nemotron_h", tmp_path / "parent", torch.float32)  # rounding would hide differences
    letters_tokenizer().save_pretrained(tmp_path / "parent")
    parent = f"parent={tmp_path}/parent"
    train(load_recipe(folder / "recipe.yaml", [parent]), tmp_path / "one")
    run_two(folder / "recipe.yaml", tmp_path / "two", "--set", parent)
    alike(tmp_path / "two", tmp_path / "one")


def refused(folder: Path, message: str, *overrides: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train(load_recipe(folder / "recipe.yaml", overrides), folder / "never")
    assert "\n" not in str(error.value)
    shutil.rmtree(folder / "never", ignore_errors=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.format=fp4", r"quantize: format fp4: not one of fp8, nvfp4, int8, int4"),
        ("quantize.group=32", r"quantize: group 32: only int4 and int8 have groups"),
        ("quantize={format: int4, bits: [4]}", r"quantize: bits \[4\]: only int8 with a group"),
        (
            "quantize={format: int8, group: 8, bits: [9]}",
            r"quantize: bits 9: codes of 8 are read at 2 to 8",
        ),
        ("quantize.keeps=[]", r"quantize\.keeps: .* did you mean 'keep'"),
        ("quantize.keep=['*.nothing']", r"--keep \*\.nothing: matches no tensor"),
        ("rank={samples: 3}", r"rank: with quantize the parent's order and its sizes stay"),
        ("distil={teacher: x}", r"distil\.teacher: with quantize the parent itself teaches"),
        ("sizes={small: {hidden_size: 16}}", r"sizes\.small: .* declares full \{\}, small"),
        ("sizes={tiny: {hidden_size: 32}}", r"sizes\.tiny: .* declares full"),
        ("train.stages.0.size_probs={tiny: 1}", r"size_probs names 'tiny'; there are full, small"),
        ("train.sizes_per_batch=3", r"train\.sizes_per_batch: 3 of 2 sizes"),
    ],
)
def test_what_cannot_be_is_told(folder: Path, override: str, message: str) -> None:
    refused(folder, message, override)


def test_a_parent_that_is_not_elastic_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "parent", tmp_path / "sorted")
    edit_elastic(tmp_path / "sorted", lambda e: e["submodels"][1].update(trained=False))
    refused(
        folder, "sorted: reordered, but its sizes were never trained", f"parent={tmp_path}/sorted"
    )
    shutil.copytree(folder / "parent", tmp_path / "plain")
    edit_json(tmp_path / "plain/config.json", lambda values: values.pop("elastic_config"))
    refused(folder, "plain: not an elastic checkpoint", f"parent={tmp_path}/plain")
    quantized(Checkpoint.open(folder / "parent"), tmp_path / "coded", "fp8")
    refused(folder, "coded: its weights are quantized", f"parent={tmp_path}/coded")


def test_sizes_that_would_not_survive_are_told_and_may_be_left_out(
    folder: Path, tmp_path: Path
) -> None:
    opened = Checkpoint.open(folder / "parent")
    model = ElasticModel.from_pretrained(folder / "parent")
    sizes: Any = {"full": {}, "small": {"hidden_size": 32}, "odd": {"hidden_size": 24}}
    model.space = ElasticSpace.of(opened.layout, sizes, trained=True)
    model.save_pretrained(tmp_path / "odd")
    here, steps = f"parent={tmp_path}/odd", "train.stages.0.steps=2"
    refused(folder, r"size odd: hidden_size = 24: .* 16 or 32 would do \(blocks of nvfp4\)", here)
    some = "sizes={full: {}, small: {hidden_size: 32}}"
    out = train(load_recipe(folder / "recipe.yaml", [here, steps, some]), tmp_path / "out")
    assert [*Checkpoint.open(out).space.sizes] == ["full", "small"]
    whole = [here, steps, "quantize={format: int8}"]  # no blocks: any size survives
    out = train(load_recipe(folder / "recipe.yaml", whole), tmp_path / "int8")
    assert [*Checkpoint.open(out).space.sizes] == ["full", "small", "odd"]
