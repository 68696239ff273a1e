"""Configs that nobody vouches for: numbers no model has, and code, files and kernels they name."""

import json
from pathlib import Path
from typing import Any

import pytest
from folders import edit_json
from hostile import promptly, refuses
from models import tiny

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel

# id -> the whole text, what the error names beside the file
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not readable as JSON: Expecting value"),
    "half": ('{"model_type": "llama"', "not readable as JSON: Expecting"),
    "array": ("[]", "not a JSON object"),
    "text": ('"llama"', "not a JSON object"),
    "bad-utf-8": (b'{"model_type": "\xff"}', "not readable as JSON: 'utf-8'"),
    "key-twice": ('{"hidden_size": 8, "hidden_size": 16}', "duplicate key 'hidden_size'"),
    "deep": ('{"rope_parameters": ' + '{"a": ' * 100 + "1" + "}" * 101, "nested too deep"),
    "deeper": ('{"a": ' * 100_000, "nested too deep"),
    "million-digits": ('{"hidden_size": ' + "9" * 10**6 + "}", "4300 digits"),
    "python": ("{'model_type': 'llama'}", "not readable as JSON: Expecting property name"),
    "pickle": (b"\x80\x04K\x01.", "not readable as JSON: 'utf-8'"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_that_is_no_json(folder: Path, name: str) -> None:
    text, named = TEXTS[name]
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(folder, "elastic/config.json: ", named)


def test_a_config_longer_than_is_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**30)
    refuses(folder, f"elastic/config.json: {2**30} bytes; at most 8388608 are read")


HUGE = 2**63
# id -> family, fields, what the error names beside the file
FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no-type": ("llama", {"model_type": None}, "model_type 'None' has no table; known: llama"),
    "unknown-type": ("llama", {"model_type": "gpt2"}, "model_type 'gpt2' has no table"),
    "type-list": ("llama", {"model_type": ["llama"]}, "model_type \"['llama']\" has no table"),
    "type-number": ("llama", {"model_type": 7}, "model_type '7' has no table"),
    "type-path": ("llama", {"model_type": "../x"}, "model_type '../x' has no table"),
    "type-that-clears-the-screen": ("llama", {"model_type": "\x1b[2J"}, "model_type '\\x1b[2J'"),
    "width-2^63": ("llama", {"hidden_size": HUGE}, f"hidden_size = {HUGE} is beyond {2**31}"),
    "width-minus-2^63": ("llama", {"hidden_size": -HUGE}, f"hidden_size = -{HUGE} is beyond"),
    "width-0": ("llama", {"hidden_size": 0}, "hidden_size = 0 is not an integer from 1 up"),
    "width-negative": ("llama", {"hidden_size": -32}, "hidden_size = -32 is not an integer from 1"),
    "width-text": ("llama", {"hidden_size": "32"}, "'hidden_size' expected int, got str"),
    "width-null": ("llama", {"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
    "width-float": ("llama", {"hidden_size": 32.0}, "'hidden_size' expected int, got float"),
    "width-bool": ("llama", {"hidden_size": True}, "'hidden_size' expected int, got bool"),
    "width-list": ("llama", {"hidden_size": [32]}, "'hidden_size' expected int, got list"),
    "ffn-negative": (
        "llama",
        {"intermediate_size": -1},
        "intermediate_size = -1 is not an integer",
    ),
    "vocabulary-0": ("llama", {"vocab_size": 0}, "vocab_size = 0 is not an integer from 1 up"),
    "layers-2^63": ("llama", {"num_hidden_layers": HUGE}, f"num_hidden_layers = {HUGE} is beyond"),
    "layers-10^9": ("qwen3", {"num_hidden_layers": 10**9}, "= 1000000000 is beyond 1024"),
    "layers-0": ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0 is not an integer"),
    "layers-negative": ("qwen3", {"num_hidden_layers": -1}, "num_hidden_layers = -1 is not an"),
    "layers-not-those-listed": (
        "nemotron_h",
        {"num_hidden_layers": 99},
        "num_hidden_layers = 99, but 6 layers are listed",
    ),
    "no-layers-listed": ("nemotron_h", {"layers_block_type": []}, "num_hidden_layers = 0"),
    "million-layers-listed": (
        "nemotron_h",
        {"layers_block_type": ["moe"] * 10**6},
        "layers_block_type has 1000000 values",
    ),
    "2000-layers-listed": (
        "nemotron_h",
        {"layers_block_type": ["moe"] * 2000},
        "num_hidden_layers = 2000 is beyond 1024",
    ),
    "unknown-layer": (
        "nemotron_h",
        {"layers_block_type": ["moe", "lstm"]},
        "`layers_block_type` contains invalid types: {'lstm'}",
    ),
    "unknown-letter": ("nemotron_h", {"hybrid_override_pattern": "MX"}, "no layer is 'X'"),
    "pattern-list": ("nemotron_h", {"hybrid_override_pattern": ["M"]}, "hybrid_override_pattern"),
    "layer-types-short": ("qwen3", {"layer_types": ["full_attention"]}, "`layer_types` (1)"),
    "experts-2^63": ("qwen3_moe", {"num_experts": HUGE}, f"num_experts = {HUGE} is beyond"),
    "experts-10^5": ("qwen3_moe", {"num_experts": 10**5}, "num_experts = 100000 in 3 layers: more"),
    "experts-text": ("qwen3_moe", {"num_experts": "6"}, "'num_experts' expected int, got str"),
    "experts-of-two-names": (
        "qwen3_moe",
        {"num_experts": 6, "num_local_experts": 4},
        "num_experts and num_local_experts name one field and differ",
    ),
    "stride-0": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 is not an"),
    "dense-layers-text": ("qwen3_moe", {"mlp_only_layers": "1"}, "'mlp_only_layers' with value"),
    "heads-0": ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0 is not an integer"),
    "groups-0": ("llama", {"num_key_value_heads": 0}, "num_key_value_heads = 0 is not an integer"),
    "groups-negative": ("llama", {"num_key_value_heads": -2}, "num_key_value_heads = -2 is not"),
    "heads-that-do-not-divide": (
        "llama",
        {"num_key_value_heads": 3},
        "num_attention_heads = 8 does not divide into num_key_value_heads = 3 groups",
    ),
    "mamba-heads-that-do-not-divide": (
        "nemotron_h",
        {"n_groups": 3},
        "mamba_num_heads = 8 does not divide into n_groups = 3 groups",
    ),
    "head-width-negative": ("llama", {"head_dim": -8}, "head_dim = -8 is not an integer"),
    "latent-negative": ("nemotron_h", {"moe_latent_size": -1}, "moe_latent_size = -1 is not an"),
    "flag-text": ("llama", {"attention_bias": "yes"}, "'attention_bias' expected bool, got str"),
    "time-steps-of-three": ("nemotron_h", {"time_step_limit": [0, 1, 2]}, "has 3 values, not 2"),
    "dtype-function": ("llama", {"dtype": "manual_seed"}, "dtype 'manual_seed' is no dtype"),
    "dtype-number": ("llama", {"dtype": 16}, "dtype '16' is no dtype of weights"),
    "dtype-map": ("llama", {"dtype": {"": "float32"}}, "is no dtype of weights"),
    "legacy-dtype": ("llama", {"dtype": None, "torch_dtype": "load"}, "torch_dtype 'load' is no"),
    "layers-that-differ": (
        "llama",
        {"per_layer_config": {"0": {"hidden_size": 8}}},
        "per_layer_config: layers of different configs",
    ),
    "rope-text": ("llama", {"rope_parameters": "yarn"}, "'rope_parameters' with value 'yarn'"),
    "another-width": ("llama", {"hidden_size": 40}, "shape (64, 32), expected (64, 40)"),
    "one-layer-more": ("llama", {"num_hidden_layers": 3}, "layers.2."),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder of every family that is spoiled here."""
    root = tmp_path_factory.mktemp("plain")
    for family in {family for family, *_ in FIELDS.values()}:
        tiny(family).save_pretrained(root / family)
    return root


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_no_model_has(plain: Path, tmp_path: Path, name: str) -> None:
    family, fields, named = FIELDS[name]
    for path in (plain / family).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_json(tmp_path / "config.json", lambda config: config.update(fields))
    if "hybrid_override_pattern" in fields:  # what newer configs say instead
        edit_json(tmp_path / "config.json", lambda config: config.pop("layers_block_type"))
    if "num_experts" in fields and len(fields) == 1:
        edit_json(tmp_path / "config.json", lambda config: config.pop("num_local_experts"))
    file = "" if "expected (" in named or named == "layers.2." else "/config.json: "
    refuses(tmp_path, file, named)


CANARY = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Canary: pass\n"
# What stock loaders of this or that library take from a config, to run it or to read it.
NAMES: dict[str, dict[str, Any]] = {
    "auto-map": {"auto_map": {"AutoConfig": "canary.Canary", "AutoModelForCausalLM": "canary.C"}},
    "auto-map-of-another": {"auto_map": {"AutoModelForCausalLM": "owner/name--canary.Canary"}},
    "custom-pipelines": {"custom_pipelines": {"text-generation": {"impl": "canary.Canary"}}},
    "model-file": {"model_file": "canary.py"},
    "weights-elsewhere": {"transformers_weights": "../stolen.safetensors"},
    "weights-beside": {"transformers_weights": "other.safetensors"},
    "kernels-of-the-hub": {"attn_implementation": "owner/kernels"},
    "kernels-by-another-name": {"_attn_implementation": "owner/kernels"},
    "kernels-by-a-third": {"_attn_implementation_internal": "owner/kernels"},
    "kernels-of-experts": {"experts_implementation": "owner/kernels"},
    "method": {"to_dict": "canary", "from_pretrained": 1, "get_text_config": None},
    "class": {"__class__": "canary", "__dict__": {}, "attribute_map": {"a": "b"}},
    "million-labels": {"num_labels": 10**6},
    "labels-that-are-none": {"id2label": 7, "label2id": []},
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_config_names_is_neither_run_nor_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The folder loads as if the key were not there: published folders have some of them."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "canary.py").write_text(CANARY)
    (folder / "other.safetensors").write_bytes(b"not weights")
    edit_json(folder / "config.json", lambda config: config.update(NAMES[name]))
    with promptly(cpu=10):
        model = ElasticModel.from_pretrained(folder)
    assert type(model.parent).__module__.startswith("transformers.")
    assert model.parent.config._attn_implementation in ("sdpa", "eager")
    assert not list(folder.rglob("ran")) and "canary" not in json.dumps(
        model.parent.config.to_dict()
    )


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ValueError, match="adapter_config.json: an adapter"):
        ElasticModel.from_pretrained(folder)


def test_a_quantization_that_is_none(folder: Path) -> None:
    values = {"quantization_config": {"quant_method": "canary"}}
    edit_json(folder / "config.json", lambda config: config.update(values))
    with pytest.raises(ValueError, match="config.json: quantization_config: the weights are not"):
        ElasticModel.from_pretrained(folder)


def test_infinity_as_mamba_models_write_it(folder: Path) -> None:
    """Bare, as published, and not JSON."""
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "time_step_limit": [0.0, Infinity]}')
    assert Checkpoint.open(folder).config.time_step_limit[1] == float("inf")
