"""The measured pass: each part alone, against the whole forward pass done by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import form_of
from command import cli
from models import letters_tokenizer
from test_quantize import SMALL, parent_of

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.precision.fake import fake
from star_elastic.quantize import Plan, make_plan
from star_elastic.quantize.sensitivity import Harm, measure, parts_of, spared
from star_elastic.records import Record, collate, encode

RECORDS = [Record(f"{n}+{n}=", str(2 * n), "sum", str(2 * n)) for n in range(3, 23)]


def planned_of(folder: Path, family: str = "nemotron_h", name: str = "nvfp4") -> Plan:
    parent = parent_of(family, folder / "plain", torch.float32)
    letters_tokenizer().save_pretrained(folder / "plain")
    return make_plan(parent, form_of(name))


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        (
            "nemotron_h",
            "0 mamba in_proj, 0 mamba out_proj, 1 experts, 1 shared experts, 2 mamba in_proj,"
            " 2 mamba out_proj, 3 attention, 4 mlp, 5 experts, 5 shared experts",
        ),
        ("qwen3_moe", "0 attention, 0 experts, 1 attention, 1 mlp, 2 attention, 2 experts"),
    ],
)
def test_parts_are_kinds_of_layers(family: str, kinds: str, tmp_path: Path) -> None:
    """Together they are all that becomes codes; what their patterns keep is just that part."""
    planned = planned_of(tmp_path, family)
    parts = parts_of(planned)
    assert ", ".join(f"{part.layer} {part.kind}" for part in parts) == kinds
    names = [weight.name for part in parts for weight in part.weights]
    assert sorted(names) == sorted(planned.chosen)
    for part in parts:
        without = make_plan(planned.checkpoint, planned.format, part.patterns)
        assert planned.chosen - without.chosen == {weight.name for weight in part.weights}
        assert without.bytes - planned.bytes == part.saved > 0


@torch.no_grad()
def by_hand(planned: Plan, harm: Harm, fields: dict[str, int]) -> float:
    """KL of stock models: one of the parent, one with the part's matrices replaced."""
    said = []
    for coded in (False, True):
        model = ElasticModel.from_pretrained(planned.checkpoint.path)
        for weight in harm.part.weights if coded else ():
            matrix = model.layout.view(model.state, weight)
            matrix.copy_(fake(matrix, planned.format))
        batch = collate(encode(model.tokenizer, RECORDS), pad=0)
        out = model.submodel(**fields)(input_ids=batch.input_ids, use_cache=False).logits
        said.append(out.double().log_softmax(-1)[:, :-1][batch.targets[:, 1:]])
    return (said[0].exp() * (said[0] - said[1])).sum(-1).mean().item()


def test_the_harm_of_a_part_is_kl_to_without(tmp_path: Path) -> None:
    planned = planned_of(tmp_path)
    harms = measure(planned, letters_tokenizer(), RECORDS)
    assert [harm.per_byte for harm in harms] == sorted((h.per_byte for h in harms), reverse=True)
    assert len(harms) == len(parts_of(planned)) == 10
    for harm in harms[:3] + harms[-2:]:
        assert harm.kl.keys() == {"full", "small"}
        for name, fields in {"full": {}, "small": SMALL["nemotron_h"]}.items():
            expected = by_hand(planned, harm, fields)
            assert harm.kl[name] == pytest.approx(expected, rel=0.01, abs=2e-6), harm.part
    gone = [h for h in harms if h.part.layer in (0, 4)]  # layers that small does not have
    assert len(gone) == 3 and all(abs(h.kl["small"]) < 1e-6 < h.kl["full"] for h in gone)


def test_the_worst_that_fit_are_spared(tmp_path: Path) -> None:
    planned = planned_of(tmp_path)
    harms = [
        Harm(part, {"full": kl})
        for part, kl in zip(parts_of(planned)[:4], (4.0, 3.0, 2.0, 0.0), strict=True)
    ]
    saved = [harm.part.saved for harm in harms]
    room = (saved[0] + saved[2] + 1) / planned.bytes
    kept = spared(harms, planned, room)
    fits = saved[1] <= saved[2] + 1
    assert kept == [harms[0], harms[1] if fits else harms[2]]
    assert sum(harm.part.saved for harm in kept) <= room * planned.bytes
    assert spared(harms, planned, 0) == [] and spared(harms, planned, 9) == harms[:3]
    with pytest.raises(ValueError, match="--spare -1: a share of the bytes"):
        spared(harms, planned, -1)


def test_the_verb_says_what_it_kept(tmp_path: Path) -> None:
    planned = planned_of(tmp_path)
    rows = [{"prompt": r.prompt, "completion": r.completion} for r in RECORDS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words: list[Any] = ["quantize", tmp_path / "plain", "--format", "nvfp4", "--out"]
    measured = ["--measure", tmp_path / "data.jsonl", "--measure-records", "8"]
    done = cli(*words, tmp_path / "q", *measured, "--spare", "0.3")
    assert "attention" in done.stderr and "KL, small" in done.stderr and "kept" in done.stderr
    coded = Checkpoint.open(tmp_path / "q")
    grown = coded.disk_bytes() / planned.bytes
    assert 1.15 < grown <= 1.3
    card = (tmp_path / "q/README.md").read_text()
    assert "In full precision, as the most harmful for their bytes:" in card
    assert " of layer " in card and "nats per token" in card
    told = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]["ignore"]
    kept = {name.rpartition(".")[0] for name in planned.chosen if name in coded.layout.stored} & {
        *told
    }
    assert kept and all(f"{module}.weight_scale" not in coded.stored for module in kept)
    done = cli(*words, tmp_path / "all", *measured)
    assert Checkpoint.open(tmp_path / "all").disk_bytes() == planned.bytes
    failed = cli(*words, tmp_path / "no", "--spare", "0.1", check=False)
    assert failed.returncode == 1 and "--spare 0.1: what harms most is measured" in failed.stderr
