"""Linear layers that cores share: the same products as torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import elastic
from torch import nn
from torch.nn import functional as F

from star_elastic.serve.engine import Engine
from star_elastic.serve.linear import SharedLinear, linear_by_parts, parts_of, share_linears


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 40),
    gap=st.integers(0, 9),
    parts=st.integers(1, 9),
    biased=st.booleans(),
)
@settings(deadline=None)
def test_parts_are_the_whole(
    shape: list[int], outputs: int, inputs: int, gap: int, parts: int, biased: bool
) -> None:
    """Whatever the shapes, whether or not the weight is a view whose rows have gaps."""
    torch.manual_seed(0)
    weight = torch.randn(outputs + gap, inputs + gap, dtype=torch.float64)[:outputs, :inputs]
    bias = torch.randn(outputs, dtype=torch.float64) if biased else None
    input = torch.randn(*shape, inputs, dtype=torch.float64)
    found = linear_by_parts(input, weight, bias, parts)
    torch.testing.assert_close(found, F.linear(input, weight, bias), rtol=1e-12, atol=1e-12)


@given(outputs=st.integers(1, 5000), cores=st.integers(1, 64))
def test_a_layer_gives_every_core_a_part_worth_a_call_or_stays_whole(
    outputs: int, cores: int
) -> None:
    parts = parts_of(outputs, cores)
    assert parts == 1 or (cores <= parts <= 4 * cores and outputs // parts >= 16)
    even = [n for n in range(cores, 4 * cores + 1) if outputs % n == 0 and outputs // n >= 16]
    assert outputs % parts == 0 or not even


@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_a_shared_layer_is_the_stock_layer(tokens: int) -> None:
    torch.manual_seed(0)
    stock = nn.Linear(32, 128)
    shared = nn.Sequential(nn.Linear(32, 128))
    shared.load_state_dict({f"0.{name}": each for name, each in stock.state_dict().items()})
    before = shared[0].weight
    share_linears(shared)
    assert type(shared[0]) is SharedLinear and shared[0].weight is before
    input = torch.randn(2, tokens, 32)
    torch.testing.assert_close(shared(input), stock(input))
    stock(input).square().sum().backward()
    shared(input).square().sum().backward()
    torch.testing.assert_close(shared[0].weight.grad, stock.weight.grad)


def test_only_float32_is_shared() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, device="meta")])
    share_linears(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_an_engine_shares_the_layers_of_every_size(family: str) -> None:
    """A view stays a view: not one more byte of weights."""
    model = elastic(family)
    before = {name: model.copied_bytes(model[name]) for name in model.sizes}
    Engine(model, slots=2, max_length=32)
    for name in model.sizes:
        linears = [each for each in model[name].modules() if isinstance(each, nn.Linear)]
        assert linears and all(type(each) is SharedLinear for each in linears)
        assert model.copied_bytes(model[name]) == before[name]
