"""Packed rows: the convolution, and whole models, see each document as if it stood alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, tiny, token_ids
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.nemotron_h import modeling_nemotron_h

from star_elastic import stock
from star_elastic.conv import causal_conv1d_fn
from star_elastic.records import Example, pack


def documents_of(lengths: list[int], first: int = 0) -> Tensor:
    """(length,) numbers of documents of these lengths, one after the other."""
    numbers = torch.arange(first, first + len(lengths), dtype=torch.int32)
    return numbers.repeat_interleave(torch.tensor(lengths))


@st.composite
def packings(draw: st.DrawFn, length: int) -> list[list[tuple[int, int]]]:
    """For one row: (start, end) of its documents, some a single token."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=6))) if length > 1 else []
    return [*zip([0, *cuts], [*cuts, length], strict=True)]


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    length=st.integers(1, 20),
    kernel=st.integers(1, 5),
    bias=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
)
def test_packed_documents_are_convolved_as_if_alone(
    data: st.DataObject, length: int, kernel: int, bias: bool, activation: str | None
) -> None:
    rows = [data.draw(packings(length)) for _ in range(2)]
    noise = torch.Generator().manual_seed(length)
    x, weight = (torch.randn(*s, generator=noise) for s in ((2, 3, length), (3, kernel)))
    offset = torch.randn(3, generator=noise) if bias else None
    seq_idx = torch.stack([documents_of([b - a for a, b in row]) for row in rows])
    x.requires_grad_(True)
    found = causal_conv1d_fn(x, weight, offset, activation=activation, seq_idx=seq_idx)
    stock_conv = modeling_nemotron_h.causal_conv1d_fn
    expected = torch.stack(
        [
            torch.cat(
                [stock_conv(x[n : n + 1, :, a:b], weight, offset, activation)[0] for a, b in row], 1
            )
            for n, row in enumerate(rows)
        ]
    )
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    whole = causal_conv1d_fn(x, weight, offset, activation=activation)
    assert torch.equal(whole, stock_conv(x, weight, offset, activation))


# Below and above the chunk of 8 and the kernel of 4, boundaries on and off a chunk's, single tokens
PACKED = [[3, 1, 10, 8, 7], [8, 8, 13], [1, 2, 4, 9, 1, 1], [29]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every", [True, False], ids=["every target", "not at boundaries"])
def test_packed_documents_are_learned_as_if_alone(family: str, every: bool) -> None:
    model = stock.use_chunk_scan(tiny(family).train())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    words = iter(token_ids(rows=1, length=200)[0].tolist())
    first = 1 if every else 2
    rows = [
        [
            Example([next(words) for _ in range(n)], [(first, n - (not every))] * (n > first + 1))
            for n in row
        ]
        for row in PACKED
    ]
    batch = pack(rows, 33, pad=0)
    logits = model(**batch.inputs, use_cache=False).logits
    assert torch.isfinite(logits).all()
    loss = summed_loss(logits, batch.input_ids, batch.targets)
    packed = gradients(model, loss)
    losses = []
    for row, examples in enumerate(rows):
        start = 0
        for example in examples:
            end = start + len(example.ids)
            ids = torch.tensor([example.ids])
            alone = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(logits[row, start:end], alone[0], atol=1e-4, rtol=1e-4)
            losses.append(summed_loss(alone, ids, batch.targets[row : row + 1, start:end]))
            start = end
    total = torch.stack(losses).sum()
    torch.testing.assert_close(loss, total, atol=1e-3, rtol=1e-5)
    for name, expected in gradients(model, total).items():
        scale = 1 + expected.abs().max()
        torch.testing.assert_close(
            packed[name] / scale, expected / scale, atol=5e-5, rtol=1e-4, msg=name
        )


def summed_loss(logits: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the targets, each said by the token before it."""
    said = targets[:, 1:]
    return F.cross_entropy(logits[:, :-1][said], ids[:, 1:][said], reduction="sum")


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_take_packed_inputs_with_labels(family: str) -> None:
    model = stock.use_chunk_scan(tiny(family).train())
    batch = pack([[Example([5, 6, 7], [(1, 3)]), Example([8, 9], [(1, 2)])]], 8, pad=0)
    labels = batch.input_ids.masked_fill(~batch.targets, -100)
    output = model(**batch.inputs, labels=labels, use_cache=False)
    expected = summed_loss(output.logits, batch.input_ids, batch.targets) / 3
    torch.testing.assert_close(output.loss, expected)
