"""The chunked scan against the stock scan and against the recurrence, token by token."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv import documents_of, packings
from torch import Tensor
from transformers.models.nemotron_h import modeling_nemotron_h

from star_elastic.scan import chunk_scan

LIMITS = [(0.0, float("inf")), (0.05, float("inf")), (0.0, 0.4), (0.1, 0.5)]


@dataclass
class Problem:
    """Inputs of a scan. `tensors` are by the scan's own argument names."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return {name: t.detach().to(dtype).requires_grad_(True) for name, t in self.tensors.items()}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels, state = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    heads = groups * per_group
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise)

    tensors = {
        "hidden_states": normal(batch, length, heads, channels),
        "dt": normal(batch, length, heads) - 1,
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
    }
    if draw(st.booleans()):
        tensors["D"] = normal(heads)
    if draw(st.booleans()):
        tensors["dt_bias"] = normal(heads)
    if draw(st.booleans()):
        tensors["initial_states"] = normal(batch, heads, channels, state)
    options = {
        "chunk_size": draw(st.sampled_from([1, 4, 8, 16, 32, 64])),
        "dt_limit": draw(st.sampled_from(LIMITS)),
        "dt_softplus": True,
        "return_final_states": True,
    }
    return Problem(tensors, options)


def recurrence(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_limit: tuple[float, float],
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + dt x B^T;  y = h C + D x: one head and one token at a time."""
    batch, length, heads, channels = hidden_states.shape
    groups, state = B.shape[2:]
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)
    y = torch.zeros_like(hidden_states)
    last = hidden_states.new_zeros(batch, heads, channels, state)
    for row in range(batch):
        for head in range(heads):
            group = head // (heads // groups)
            h = last[row, head] if initial_states is None else initial_states[row, head]
            for t in range(length):
                x, step = hidden_states[row, t, head], dt[row, t, head]
                h = torch.exp(step * A[head]) * h + step * torch.outer(x, B[row, t, group])
                y[row, t, head] = h @ C[row, t, group] + (0 if D is None else D[head] * x)
            last[row, head] = h
    return y, last


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_outputs_and_states_are_those_of_the_stock_scan(problem: Problem) -> None:
    expected = modeling_nemotron_h.mamba2_chunk_scan(**problem.tensors, **problem.options)
    found = chunk_scan(**problem.tensors, **problem.options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_gradients_are_those_of_the_stock_scan(problem: Problem) -> None:
    gradients = []
    for scan in (chunk_scan, modeling_nemotron_h.mamba2_chunk_scan):
        arguments = problem.arguments()
        y, last = scan(**arguments, **problem.options)
        (y.square().sum() + last.sum()).backward()
        gradients.append({name: tensor.grad for name, tensor in arguments.items()})
    ours, theirs = gradients
    for name, expected in theirs.items():
        scale = 1 + expected.abs().max().item()
        torch.testing.assert_close(
            ours[name] / scale, expected / scale, atol=2e-4, rtol=2e-3, msg=name
        )


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_outputs_and_states_are_those_of_the_recurrence(problem: Problem) -> None:
    exact = {name: tensor.double() for name, tensor in problem.tensors.items()}
    y, last = recurrence(**exact, **problem.options)
    found = chunk_scan(**problem.tensors, **problem.options)
    torch.testing.assert_close(found[0].double(), y, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found[1].double(), last, atol=2e-4, rtol=2e-4)


@settings(max_examples=20, deadline=None)
@given(problem=problems(), data=st.data())
def test_a_scan_goes_on_from_its_state(problem: Problem, data: st.DataObject) -> None:
    length = problem.tensors["dt"].shape[1]
    cut = data.draw(st.integers(0, length - 1))
    whole = chunk_scan(**problem.tensors, **problem.options)
    if cut == 0:
        return
    sequences = ("hidden_states", "dt", "B", "C")
    head = {n: t[:, :cut] if n in sequences else t for n, t in problem.tensors.items()}
    tail = {n: t[:, cut:] if n in sequences else t for n, t in problem.tensors.items()}
    first, state = chunk_scan(**head, **problem.options)
    second, last = chunk_scan(**{**tail, "initial_states": state}, **problem.options)
    torch.testing.assert_close(torch.cat([first, second], 1), whole[0], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(last, whole[1], atol=2e-4, rtol=2e-4)


@settings(max_examples=20, deadline=None)
@given(problem=problems())
def test_the_last_state_comes_only_when_asked_for(problem: Problem) -> None:
    y = chunk_scan(**problem.tensors, **{**problem.options, "return_final_states": False})
    assert isinstance(y, Tensor)
    assert torch.equal(y, chunk_scan(**problem.tensors, **problem.options)[0])


def test_strong_decay_gives_no_nan_in_backward() -> None:
    """Sums of decays over a chunk far beyond what exp can hold."""
    tensors = {
        "hidden_states": torch.ones(1, 64, 2, 3),
        "dt": torch.full((1, 64, 2), 20.0),
        "A": torch.tensor([-50.0, -1e-4]),
        "B": torch.ones(1, 64, 1, 4),
        "C": torch.ones(1, 64, 1, 4),
    }
    problem = Problem(tensors, {"chunk_size": 64, "dt_softplus": True})
    arguments = problem.arguments()
    y = chunk_scan(**arguments, **problem.options)
    assert isinstance(y, Tensor)
    y.sum().backward()
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected, _ = recurrence(**exact, dt_limit=(0.0, float("inf")))
    torch.testing.assert_close(y.double(), expected, atol=1e-2, rtol=1e-4)
    for name, tensor in arguments.items():
        assert tensor.grad is not None and bool(tensor.grad.isfinite().all()), name


def test_half_precision_inputs_are_scanned_in_fp32() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "hidden_states": torch.randn(2, 20, 4, 3, generator=draw),
        "dt": torch.randn(2, 20, 4, generator=draw),
        "A": -torch.rand(4, generator=draw),
        "B": torch.randn(2, 20, 2, 5, generator=draw),
        "C": torch.randn(2, 20, 2, 5, generator=draw),
    }
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()} | {"A": tensors["A"]}
    options = {"chunk_size": 8, "dt_softplus": True}
    y = chunk_scan(**half, **options)
    expected = modeling_nemotron_h.mamba2_chunk_scan(**half, **options)
    assert isinstance(y, Tensor) and y.dtype == torch.float32
    torch.testing.assert_close(y, expected.float(), atol=0.1, rtol=0.05)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), data=st.data())
def test_packed_documents_are_scanned_as_if_alone(problem: Problem, data: st.DataObject) -> None:
    """Outputs, last states and every gradient; the first document goes on from initial states."""
    batch, length = problem.tensors["dt"].shape[:2]
    rows = [data.draw(packings(length)) for _ in range(batch)]
    seq_idx = torch.stack([documents_of([b - a for a, b in row], first=3) for row in rows])
    packed, alone = problem.arguments(), problem.arguments()
    y, last = chunk_scan(**packed, **problem.options, seq_idx=seq_idx)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    ((y * noise).sum() + last.sum()).backward()
    total = torch.zeros(())
    for number, row in enumerate(rows):
        for start, end in row:
            one, state = chunk_scan(**part(alone, number, start, end), **problem.options)
            torch.testing.assert_close(y[number, start:end], one[0], atol=2e-4, rtol=2e-4)
            total = total + (one[0] * noise[number, start:end]).sum()
            if end == length:
                torch.testing.assert_close(last[number], state[0], atol=2e-4, rtol=2e-4)
                total = total + state.sum()
    total.backward()
    for name, tensor in alone.items():
        expected = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        scale = 1 + expected.abs().max()
        torch.testing.assert_close(
            packed[name].grad / scale, expected / scale, atol=2e-4, rtol=2e-3, msg=name
        )


def part(arguments: dict[str, Tensor], row: int, start: int, end: int) -> dict[str, Tensor]:
    """Arguments of a scan of one document; only a row's first one has initial states."""
    sequences = ("hidden_states", "dt", "B", "C")
    chosen = {
        name: tensor[row : row + 1, start:end] if name in sequences else tensor
        for name, tensor in arguments.items()
    }
    states = chosen.pop("initial_states", None)
    return chosen if states is None or start else {**chosen, "initial_states": states[row][None]}


def test_nothing_of_an_earlier_document_is_left() -> None:
    """States near the largest float, whether they fade or not, do not pass a boundary."""
    tensors = {
        "hidden_states": torch.full((1, 40, 2, 3), 1e17),
        "dt": torch.full((1, 40, 2), 20.0),
        "A": torch.tensor([-20.0, -1e-12]),
        "B": torch.full((1, 40, 1, 4), 1e17),
        "C": torch.ones(1, 40, 1, 4),
    }
    for tensor in (tensors["hidden_states"], tensors["dt"], tensors["B"]):
        tensor[:, 21:] = 0.5
    seq_idx = documents_of([21, 19])[None]
    problem = Problem(tensors, {"chunk_size": 16})
    arguments = problem.arguments()
    y = chunk_scan(**arguments, **problem.options, seq_idx=seq_idx)
    assert isinstance(y, Tensor)
    alone = chunk_scan(**part(tensors, 0, 21, 40), **problem.options)
    torch.testing.assert_close(y[:, 21:], alone, atol=1e-3, rtol=1e-3)
    y[:, 21:].sum().backward()
    for name in ("hidden_states", "B", "C"):
        assert not arguments[name].grad[:, :21].any(), name
    for name, tensor in arguments.items():
        assert tensor.grad is None or torch.isfinite(tensor.grad).all(), name


def test_documents_are_told_by_change_of_number_only() -> None:
    problem = Problem(
        {
            "hidden_states": torch.randn(1, 9, 2, 3),
            "dt": torch.randn(1, 9, 2),
            "A": -torch.rand(2),
            "B": torch.randn(1, 9, 1, 4),
            "C": torch.randn(1, 9, 1, 4),
        },
        {"chunk_size": 4, "dt_softplus": True},
    )
    ids = ([0, 0, 0, 1, 1, 0, 0, 0, 0], [5, 5, 5, 2, 2, 9, 9, 9, 9])
    first, second = (
        chunk_scan(**problem.tensors, **problem.options, seq_idx=torch.tensor([row])) for row in ids
    )
    assert torch.equal(first, second)
    single = chunk_scan(**problem.tensors, **problem.options, seq_idx=torch.zeros(1, 9))
    assert torch.equal(single, chunk_scan(**problem.tensors, **problem.options))
