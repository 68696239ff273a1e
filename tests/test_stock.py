"""The stock classes' faults: that they are there, and that they are mended in one place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CONFIGS,
    FAMILIES,
    ORDER,
    SMALL,
    kept_layers,
    layout_of,
    logits,
    perturb,
    tiny,
    tiny_config,
    token_ids,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from star_elastic import configs, stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.slicing import slice_checkpoint
from star_elastic.submodel import ElasticSpace
from star_elastic.symbols import DEPTH

MIXERS = [family for family in FAMILIES if family.startswith("nemotron_h")]


def adversarial(**changes: Any) -> PreTrainedModel:
    """A stock NemotronH, not mended, whose dt is far below the clamp of stock prefill.

    Its state then hardly moves: B and x are scaled up so that what enters still matters.
    """
    config = tiny_config("nemotron_h", hybrid_override_pattern="MM*M", **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    perturb(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.fill_(-9.0)  # softplus: about 1e-4, a tenth of time_step_min
            if name.endswith("conv1d.weight"):
                parameter.mul_(20)
            if name.endswith(".D"):
                parameter.fill_(0.0)
    return model


@torch.no_grad()
def step_by_step(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the same tokens, one at a time."""
    cache, said = None, []
    for token in ids.split(1, dim=1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        said.append(output.logits)
    return torch.cat(said, 1)


def gap(model: PreTrainedModel, ids: Tensor) -> float:
    return (logits(model, ids) - step_by_step(model, ids)).abs().max().item()


def test_prefill_is_decode_once_mended() -> None:
    model, ids = adversarial(), token_ids(length=30)
    assert gap(model, ids) > 1e-2  # fails once upstream has mended the clamp: then drop `mend`
    stock.mend(model)
    assert gap(model, ids) < 1e-4


def test_every_way_to_a_model_mends_it(tmp_path: Path) -> None:
    ids = token_ids(length=30)
    model = ElasticModel(adversarial())
    assert gap(model.parent, ids) < 1e-4
    assert gap(model.submodel(hidden_size=16), ids) < 1e-4
    model.save_pretrained(tmp_path / "elastic")
    assert gap(ElasticModel.from_pretrained(tmp_path / "elastic").parent, ids) < 1e-4
    built = stock.build(model.parent.config)
    built.load_state_dict(model.parent.state_dict())
    assert gap(built.eval(), ids) < 1e-4


@pytest.mark.parametrize("written", ["elastic", "slice"])
def test_written_folders_need_no_mending(tmp_path: Path, written: str) -> None:
    ids = token_ids(length=30)
    model = ElasticModel(adversarial())
    model.space = ElasticSpace.of(model.layout, {"full": {}, "small": {"hidden_size": 24}})
    model.save_pretrained(tmp_path / "elastic")
    slice_checkpoint(Checkpoint.open(tmp_path / "elastic"), tmp_path / "slice", "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / written).eval()
    assert gap(loaded, ids) < 1e-4


def test_limits_of_dt_that_the_config_sets_are_kept() -> None:
    config = tiny_config("nemotron_h", time_step_limit=(0.01, 0.05))
    model = stock.mend(AutoModelForCausalLM.from_config(config))
    mixers = [m for m in model.modules() if isinstance(m, NemotronHMamba2Mixer)]
    assert [tuple(mixer.time_step_limit) for mixer in mixers] == [(0.01, 0.05)] * 2
    again = AutoConfig.for_model(**(configs.config_json(config)))
    assert tuple(again.time_step_limit) == (0.01, 0.05)
    assert again.time_step_min == 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_reads_back_as_the_config(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    values = configs.config_json(config)
    (tmp_path / "config.json").write_text(json.dumps(values, allow_nan=False))
    again = AutoConfig.from_pretrained(tmp_path)
    ours = {"time_step_min", "architectures", "_name_or_path"}
    expected, found = config.to_dict(), again.to_dict()
    differing = {key for key in expected | found if expected.get(key) != found.get(key)}
    assert differing <= ours
    assert values["architectures"] == [type(tiny(family)).__name__]


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_has_the_published_field_names(family: str) -> None:
    values = configs.config_json(tiny_config(family))
    for field in SMALL[family]:
        parent = len(ORDER[family]) if field == DEPTH else CONFIGS[family][field]
        assert values[field] == parent


@pytest.mark.parametrize("implementation", ["batched_mm", "eager", "grouped_mm"])
def test_batched_mm_is_never_left_selected(implementation: str) -> None:
    model = tiny("qwen3_moe")
    model.set_experts_implementation(implementation)
    kept = "eager" if implementation == "batched_mm" else implementation
    assert stock.mend(model).config._experts_implementation == kept
    small = ElasticModel(model, layer_order=ORDER["qwen3_moe"]).submodel(**SMALL["qwen3_moe"])
    assert small.config._experts_implementation == kept


def test_expert_rows_that_grouped_mm_cannot_take_run_all_the_same() -> None:
    """bf16 rows of 12 are 24 bytes: the stock default crashes, which is why `mend` changes it."""
    model = tiny("nemotron_h", moe_intermediate_size=12).to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="16 bytes"):
        model(token_ids())
    assert torch.isfinite(stock.mend(model)(token_ids()).logits).all()


def test_build_on_meta_allocates_nothing() -> None:
    model = stock.build(tiny_config("nemotron_h"), device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_child_config_differs_in_its_fields_only(family: str) -> None:
    layout, config = layout_of(family), tiny_config(family)
    fields = {field: value for field, value in SMALL[family].items() if field != DEPTH}
    child = configs.child_config(layout, fields)
    before, after = config.to_dict(), child.to_dict()
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    alias = {"num_experts": "num_local_experts"} if family == "qwen3_moe" else {}
    assert changed - {"head_dim"} == {alias.get(field, field) for field in fields}
    assert child.head_dim == 8
    for field, value in fields.items():
        assert getattr(child, field) == value
        assert getattr(config, field) == CONFIGS[family][field]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallower_child_keeps_the_best_layers(family: str) -> None:
    layout, kept = layout_of(family), kept_layers(family, SMALL[family])
    child = configs.child_config(layout, {DEPTH: len(kept)})
    assert child.num_hidden_layers == len(kept) < len(layout.blocks)
    assert Layout(child).blocks == [layout.blocks[layer] for layer in kept]


def test_values_per_layer_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="LlamaConfig cannot express intermediate_size per layer"):
        configs.child_config(layout_of("llama"), {"intermediate_size": [16, 8]})


def test_a_config_that_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="LlamaConfig cannot express.*hidden_size"):
        configs.child_config(layout_of("llama"), {"hidden_size": "wide"})  # type: ignore[dict-item]


@pytest.mark.parametrize("family", MIXERS)
def test_chunk_scan_says_what_the_stock_scan_says(family: str) -> None:
    model, ids = tiny(family), token_ids(length=29)
    expected = logits(model, ids)
    torch.testing.assert_close(
        logits(stock.use_chunk_scan(model), ids), expected, atol=1e-4, rtol=1e-4
    )


def test_chunk_scan_is_used_by_this_model_only() -> None:
    ids = token_ids(length=29)
    other, model = tiny("nemotron_h"), tiny("nemotron_h")
    before = logits(other, ids)
    stock.use_chunk_scan(model)
    scans = {each: scan_of(each) for each in (model, other)}
    assert scans[model].__module__ == "star_elastic.scan"
    assert scans[other].__module__ == "transformers.models.nemotron_h.modeling_nemotron_h"
    assert scan_of(tiny("nemotron_h")) is scans[other]
    assert torch.equal(logits(other, ids), before)


def scan_of(model: PreTrainedModel) -> Any:
    """The scan that the mixers of a model find by the name they call."""
    mixer = next(m for m in model.modules() if isinstance(m, NemotronHMamba2Mixer))
    forward: Any = type(mixer).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward.__globals__["mamba2_chunk_scan"]


def test_chunk_scan_keeps_the_mixers_own_class() -> None:
    model = stock.use_chunk_scan(stock.use_chunk_scan(tiny("nemotron_h")))
    mixers = [m for m in model.modules() if isinstance(m, NemotronHMamba2Mixer)]
    assert len(mixers) == 2
    assert {type(mixer).__name__ for mixer in mixers} == {"NemotronHMamba2Mixer"}


@pytest.mark.parametrize("family", MIXERS)
def test_chunk_scan_gradients_are_the_stock_ones(family: str) -> None:
    ids = token_ids(length=21)
    gradients = []
    for prepare in (lambda model: model, stock.use_chunk_scan):
        model = prepare(tiny(family)).requires_grad_(True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_scans_in_training_mode_agree(tmp_path: Path) -> None:
    model, ids = tiny("nemotron_h").train(), token_ids(length=21)
    expected = logits(model, ids)
    found = logits(stock.use_chunk_scan(model), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_decoding_with_chunk_scan_goes_on_from_its_state() -> None:
    model, ids = stock.use_chunk_scan(tiny("nemotron_h")), token_ids(length=20)
    with torch.no_grad():
        first = model(input_ids=ids[:, :11], use_cache=True)
        rest = model(input_ids=ids[:, 11:], past_key_values=first.past_key_values, use_cache=True)
    said = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(said, logits(model, ids), atol=1e-4, rtol=1e-4)
