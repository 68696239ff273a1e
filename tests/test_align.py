"""Alignment from the named shapes: steps that lead to sizes that pass, and refusals by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, layout_of

from bench.nano import nano_config
from star_elastic.align import Alignment
from star_elastic.layout import Layout
from star_elastic.submodel import check_fields

NANO = Layout(nano_config("ME*E"))


def steps(text: str | None, ranks: int = 1) -> dict[str, int]:
    return Alignment.parse(text, ranks).steps(NANO)


def test_blocks_lie_along_inputs() -> None:
    found = steps("gguf")
    assert found["hidden_size"] == found["moe_intermediate_size"] == 256
    assert found["n_routed_experts"] == found["num_experts_per_tok"] == 1
    assert found["num_attention_heads"] == 2  # 2 KV heads of 128 channels fill a block
    assert found["mamba_head_dim"] == 4  # of 64 heads


def test_ranks_share_widths_and_heads_out() -> None:
    found = steps("nvfp4", ranks=4)
    assert found["moe_intermediate_size"] == 64 and found["hidden_size"] == 16
    assert found["num_attention_heads"] == 4


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(
    data=st.data(), multiple=st.sampled_from(["1", "2", "4", "8"]), ranks=st.sampled_from([1, 2])
)
def test_any_size_on_the_steps_passes(
    family: str, data: st.DataObject, multiple: str, ranks: int
) -> None:
    layout = layout_of(family)
    alignment = Alignment.parse(multiple, ranks)
    axis, step = data.draw(st.sampled_from([*alignment.steps(layout).items()]))
    values = range(step, layout.sizes[axis] + 1, step)
    if not values:
        return
    fields = {axis: data.draw(st.sampled_from(values))}
    try:
        check_fields(layout, fields)
    except ValueError:  # fewer experts than a token uses, and the like
        return
    alignment.check(layout, fields)


@pytest.mark.parametrize(
    ("text", "ranks", "fields", "complaint"),
    [
        ("gguf", 1, {"hidden_size": 1920}, "hidden_size = 1920: .* 1792 or 2048 would do"),
        ("128", 1, {"moe_intermediate_size": 960}, "moe_intermediate_size = 960: .*896 or 1024"),
        ("nvfp4", 8, {"moe_intermediate_size": 960}, "960.*not a multiple of 128"),
        (None, 3, {"num_attention_heads": 16}, "num_attention_heads = 16 does not divide over 3"),
        ("16", 1, {"hidden_size": 8}, "hidden_size = 8: .*; 16 would do"),
    ],
)
def test_what_a_target_cannot_use_is_refused(
    text: str | None, ranks: int, fields: dict[str, int], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        Alignment.parse(text, ranks).check(NANO, fields)


def test_the_parents_own_widths_are_not_its_affair() -> None:
    Alignment.parse("gguf").check(NANO, {})  # 2688 is no multiple of 256
    Alignment.parse("nvfp4").check(NANO, {"hidden_size": 1920, "moe_intermediate_size": 960})


def test_heads_and_their_channels_count_together() -> None:
    """Each may shrink by itself on its step; together they may not fill a block any more."""
    alignment = Alignment.parse("64")
    for fields in ({"mamba_num_heads": 8}, {"mamba_head_dim": 1}):
        alignment.check(NANO, fields)
    with pytest.raises(ValueError, match="mixer.out_proj.weight, 8, is not a multiple of 64"):
        alignment.check(NANO, {"mamba_num_heads": 8, "mamba_head_dim": 1})


def test_per_layer_values_are_checked_layer_by_layer() -> None:
    alignment = Alignment.parse("16")
    alignment.check(NANO, {"moe_intermediate_size": [16, 32, 48, 64]})
    with pytest.raises(ValueError, match="moe_intermediate_size = 40"):
        alignment.check(NANO, {"moe_intermediate_size": [16, 32, 48, 40]})


@pytest.mark.parametrize("text", ["0", "-16", "nvfp8", "1.5", ""])
def test_unknown_targets(text: str) -> None:
    with pytest.raises(ValueError, match=f"--align {text}: .*nvfp4, mxfp4, gguf"):
        Alignment.parse(text)


def test_unknown_ranks() -> None:
    with pytest.raises(ValueError, match="--tensor-parallel 0"):
        Alignment.parse(None, 0)
