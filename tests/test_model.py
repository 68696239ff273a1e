"""Submodels on views of the parent: the stock class's own results, without copies (I2, I3)."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CONFIGS,
    FAMILIES,
    ORDER,
    PREFIX,
    SMALL,
    elastic,
    logits,
    standalone,
    tiny,
    token_ids,
)
from reference import cut
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.model import ElasticModel
from star_elastic.symbols import DEPTH

BREAKS_GROUPS = [family for family in FAMILIES if family != "qwen3_moe"]


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["full", "small", "prefix"])
def test_a_view_is_the_stock_model_on_copied_tensors(family: str, size: str) -> None:
    model, ids = elastic(family), token_ids()
    fields = model.sizes[size].config
    copied = standalone(family, fields, cut(family, model.parent.state_dict(), fields))
    assert torch.equal(logits(model[size], ids), logits(copied, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_holds_the_tensors_cut_by_hand(family: str) -> None:
    model = elastic(family)
    expected = cut(family, model.parent.state_dict(), SMALL[family])
    found = model["small"].state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_each_axis_alone(family: str) -> None:
    model, ids = elastic(family), token_ids(rows=1)
    for field, value in SMALL[family].items():
        fields = {field: value}
        copied = standalone(family, fields, cut(family, model.parent.state_dict(), fields))
        assert torch.equal(logits(model.submodel(**fields), ids), logits(copied, ids)), field


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_nest(family: str) -> None:
    model, ids = elastic(family), token_ids()
    middle = ElasticModel(model.submodel(**PREFIX[family]))
    twice = middle.submodel(**SMALL[family])
    expected = model["small"].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twice.state_dict().items())
    assert torch.equal(logits(twice, ids), logits(model["small"], ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_size_is_the_parent(family: str) -> None:
    model, ids = elastic(family), token_ids()
    assert torch.equal(logits(model["full"], ids), logits(model.parent, ids))
    assert model.copied_bytes(model["full"]) == 0


@pytest.mark.parametrize("family", BREAKS_GROUPS)
def test_prefixes_are_not_copied(family: str) -> None:
    model = elastic(family)
    owned = {t.untyped_storage().data_ptr() for t in model.parent.state_dict().values()}
    pointers = {t.untyped_storage().data_ptr() for t in model["prefix"].state_dict().values()}
    assert pointers < owned  # some layers are dropped
    assert model.copied_bytes(model["prefix"]) == 0


@pytest.mark.parametrize("family", BREAKS_GROUPS)
def test_three_sizes_cost_one_copy(family: str) -> None:
    model = elastic(family)
    half = model.submodel(hidden_size=16)
    resident = storage_bytes(model.parent, model["full"], model["prefix"], half)
    assert resident <= 1.01 * storage_bytes(model.parent)


def storage_bytes(*models: PreTrainedModel) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for model in models
        for tensor in model.state_dict().values()
    }
    return sum(storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_bytes_are_what_the_storages_say(family: str) -> None:
    model = elastic(family)
    both = storage_bytes(model.parent, model["small"])
    assert model.copied_bytes(model["small"]) == both - storage_bytes(model.parent) > 0


def test_a_grouped_mamba_cut_copies_just_the_grouped_tensors() -> None:
    model = elastic("nemotron_h")
    view = model.submodel(mamba_num_heads=4)
    # Of 2 groups of 4 heads x 4 channels, 2 heads each stay; B and C are 2 x 6 rows each.
    inner, states, heads = 16, 12, 4
    rows = (2 * inner + 2 * states + heads) * 32  # in_proj
    rows += (inner + 2 * states) * (4 + 1)  # conv1d and its bias
    rows += 3 * heads + inner + 32 * inner  # dt_bias, A_log, D; norm; out_proj
    assert model.copied_bytes(view) == 2 * 4 * rows  # two mixers, four bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_the_parent_shows_in_every_size(family: str) -> None:
    model = elastic(family)
    view = model["prefix"]
    with torch.no_grad():
        model.parent.get_input_embeddings().weight.mul_(2)
    width = PREFIX[family]["hidden_size"]
    expected = model.parent.get_input_embeddings().weight[:, :width]
    assert torch.equal(view.get_input_embeddings().weight, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["full", "small"])
def test_generate_with_a_cache_is_generate_without(family: str, size: str) -> None:
    model, ids = elastic(family)[size], token_ids(rows=2, length=9)
    generate: Any = model.generate
    tokens = [
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert tokens[0].shape == (2, 17)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_sizes_interleaved_are_two_sizes_apart(family: str) -> None:
    model, ids = elastic(family), token_ids(rows=1, length=6)
    apart = {size: steps(model[size], ids) for size in ("full", "small")}
    running = {size: decode(model[size], ids) for size in ("full", "small")}
    together: dict[str, list[torch.Tensor]] = {"full": [], "small": []}
    for _ in range(ids.shape[1]):
        for size, stream in running.items():
            together[size].append(next(stream))
    for size, expected in apart.items():
        assert all(torch.equal(*pair) for pair in zip(together[size], expected, strict=True))


def decode(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    """Logits token by token, with a cache."""
    cache = None
    for token in ids.split(1, dim=1):
        with torch.no_grad():
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield output.logits


def steps(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    return list(decode(model, ids))


def test_two_sizes_in_two_threads() -> None:
    model, ids = elastic("nemotron_h"), token_ids()
    expected = {size: logits(model[size], ids) for size in ("full", "small")}
    found: dict[str, list[torch.Tensor]] = {"full": [], "small": []}

    def run(size: str) -> None:
        found[size] += [logits(model[size], ids) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(size,)) for size in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in found:
        assert len(found[size]) == 5
        assert all(torch.equal(each, expected[size]) for each in found[size])


def test_tied_embeddings_stay_tied() -> None:
    view = elastic("llama-tied")["small"]
    embeddings, head = view.get_input_embeddings().weight, view.get_output_embeddings().weight
    assert head.data_ptr() == embeddings.data_ptr()
    assert head.shape == embeddings.shape == (64, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_narrowed_tensors_are_differentiable(family: str) -> None:
    model = elastic(family)
    model.parent.requires_grad_(True)
    narrowed = model.narrowed(SMALL[family])
    kept = model.layout.kept(model.layout.sizes_of(SMALL[family]), model.layout.weights)
    learned = {name for name, weight in kept if not weight.is_buffer}
    assert {name for name, tensor in narrowed.items() if tensor.requires_grad} == learned


UNEVEN = {  # every axis that layers can differ in, one value per parent's layer
    family: {
        field: [CONFIGS[family][field], value] * 3
        for field, value in fields.items()
        if field not in ("hidden_size", DEPTH)
    }
    for family, fields in SMALL.items()
}


def uneven(family: str, **fields: int) -> dict[str, Any]:
    layers = len(ORDER[family])
    return {field: values[:layers] for field, values in UNEVEN[family].items()} | fields


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_may_differ(family: str) -> None:
    """Odd layers are small, even ones full: each layer is that of the model all of whose are."""
    model, ids = elastic(family), token_ids()
    found = model.submodel(**uneven(family, hidden_size=24))
    even = model.submodel(hidden_size=24)
    small = model.submodel(**(SMALL[family] | {DEPTH: len(ORDER[family])}))
    for layer, module in enumerate(stock.layers_of(found)):
        expected = stock.layers_of(small if layer % 2 else even)[layer].state_dict()
        assert module.state_dict().keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) for name, t in module.state_dict().items())
    sizes = model.layout.sizes_of(uneven(family, hidden_size=24))
    assert model.layout.count(sizes) == sum(p.numel() for p in found.parameters())
    assert torch.isfinite(logits(found, ids)).all()
    assert not torch.equal(logits(found, ids), logits(even, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_differ_generate_with_a_cache(family: str) -> None:
    model, ids = elastic(family).submodel(**uneven(family)), token_ids(rows=2, length=9)
    generate: Any = model.generate
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    cached = generate(input_ids=ids, use_cache=True, **settings)
    assert torch.equal(cached, generate(input_ids=ids, use_cache=False, **settings))


@pytest.mark.parametrize("field", ["hidden_size", DEPTH])
def test_widths_of_the_whole_model_take_one_value(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} = .* takes one value"):
        elastic("llama").submodel(**{field: [24, 16]})


def test_values_per_layer_are_as_many_as_layers() -> None:
    with pytest.raises(ValueError, match="it takes 2 values, one per layer"):
        elastic("llama").submodel(intermediate_size=[8])


def test_depth_wants_a_layer_order() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers: this model has no layer_order"):
        ElasticModel(tiny("llama")).submodel(num_hidden_layers=1)


def test_the_same_size_is_built_once() -> None:
    model = elastic("llama")
    assert model["small"] is model["small"]


def test_an_unknown_size_lists_those_there_are() -> None:
    with pytest.raises(KeyError, match="no size 'huge'; there are full, small, prefix"):
        elastic("llama")["huge"]


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"head_dim": 4}, "head_dim is no axis of this llama model"),
        ("llama", {"n_routed_experts": 4}, "n_routed_experts is no axis"),
        ("llama", {"hidden_size": 33}, "hidden_size = 33 is larger than the parent's 32"),
        ("llama", {"hidden_size": 0}, "hidden_size = 0 is not a positive integer"),
        ("llama", {"hidden_size": -8}, "hidden_size = -8 is not a positive integer"),
        ("llama", {"hidden_size": True}, "hidden_size = True is not a positive integer"),
        ("llama", {"hidden_size": 8.0}, "hidden_size = 8.0 is not a positive integer"),
        ("llama", {"num_attention_heads": 3}, "num_attention_heads = 3 does not divide"),
        ("nemotron_h", {"mamba_num_heads": 5}, "mamba_num_heads = 5 does not divide"),
        ("nemotron_h", {"n_routed_experts": 1}, "n_routed_experts = 1 is fewer than"),
        ("qwen3_moe", {"num_experts": 1}, "num_experts = 1 is fewer than num_experts_per_tok = 2"),
    ],
)
def test_a_size_that_cannot_be_names_field_and_value(
    family: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        elastic(family).submodel(**fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_folder_loads(family: str, tmp_path: Path) -> None:
    stock, ids = tiny(family), token_ids()
    stock.save_pretrained(tmp_path)
    model = ElasticModel.from_pretrained(tmp_path)
    assert list(model.sizes) == ["full"]
    assert torch.equal(logits(model["full"], ids), logits(stock, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_building_a_size_leaves_the_parent_alone(family: str) -> None:
    model, ids = elastic(family), token_ids()
    before, said = state_of(model.parent), logits(model.parent, ids)
    logits(model["small"], ids)
    assert all(torch.equal(t, before[name]) for name, t in model.parent.state_dict().items())
    assert torch.equal(logits(model.parent, ids), said)


def test_generation_config_goes_along() -> None:
    model = elastic("llama")
    assert model.parent.generation_config is not None
    model.parent.generation_config.max_new_tokens = 5
    assert model["small"].generation_config.max_new_tokens == 5
