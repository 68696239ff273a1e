"""Losses in chunks: the value and the gradient of the whole, without ever holding it."""

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, elastic
from torch import Tensor
from training import one_batch

from star_elastic import stock
from star_elastic.train.distillation import Lesson, forward_kl, hidden_distance, loss, predicting
from star_elastic.train.parts import Narrowed, Parts
from star_elastic.train.recipe import Distil
from star_elastic.train.teacher import Teacher

VOCABULARY, POSITIONS = 13, 7


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Lesson]:
    """Student's hidden states and head, labels, and a wider teacher's lesson."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(POSITIONS, 4, generator=draw, requires_grad=True)
    head = torch.randn(VOCABULARY, 4, generator=draw, requires_grad=True)
    labels = torch.randint(VOCABULARY, (POSITIONS,), generator=draw)
    taught = torch.randn(POSITIONS, 6, generator=draw)
    return hidden, head, labels, Lesson(taught, torch.randn(VOCABULARY, 6, generator=draw))


TERMS = [
    Distil(),
    Distil(temperature=2.5),
    Distil(cross_entropy=0.5),
    Distil(hidden=0.3),
    Distil(temperature=0.7, cross_entropy=2.0, hidden=1.0),
]


def by_hand(hidden: Tensor, head: Tensor, labels: Tensor, lesson: Lesson, s: Distil) -> Tensor:
    student, teacher = hidden @ head.T, lesson.hidden @ lesson.head.T
    p = (teacher / s.temperature).softmax(-1)
    q = (student / s.temperature).log_softmax(-1)
    total = s.temperature**2 * (p * (p.log() - q)).sum(-1).mean()
    total = total + s.cross_entropy * F.cross_entropy(student, labels)
    near = lesson.hidden[:, : hidden.shape[1]]
    return total + s.hidden * (hidden - near).square().sum() / near.square().sum()


@pytest.mark.parametrize("settings", TERMS, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, POSITIONS, 100])
def test_chunks_are_the_whole(settings: Distil, chunk: int) -> None:
    hidden, head, labels, lesson = tensors()
    expected = by_hand(hidden, head, labels, lesson, settings)
    gradients = torch.autograd.grad(expected, (hidden, head))
    found = loss(hidden, head, labels, lesson, settings, logits=chunk * VOCABULARY)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, (hidden, head)), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 100])
def test_without_a_teacher_it_is_cross_entropy(chunk: int) -> None:
    hidden, head, labels, _ = tensors()
    found = loss(hidden, head, labels, None, Distil(), logits=chunk * VOCABULARY)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ head.T, labels))


def kept(chunk: int) -> list[int]:
    """Sizes of the tensors that the backward pass would read, weights and states aside."""
    hidden, head, labels, lesson = tensors()
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(hidden, head, labels, lesson, Distil(), logits=chunk * VOCABULARY)
    return sizes


def test_no_tensor_of_all_logits_is_kept() -> None:
    everything = POSITIONS * VOCABULARY
    assert everything in kept(chunk=100)
    assert max(kept(chunk=2)) < everything


def test_the_teacher_itself_has_no_loss() -> None:
    _, _, labels, lesson = tensors()
    assert loss(lesson.hidden, lesson.head, labels, lesson, Distil(hidden=1.0)).item() == 0


def test_no_position_is_no_loss() -> None:
    hidden, head, labels, lesson = tensors()
    nothing = Lesson(lesson.hidden[:0], lesson.head)
    found = loss(hidden[:0], head, labels[:0], nothing, Distil(hidden=1.0))
    assert found.item() == 0
    found.backward()
    assert not hidden.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [2, 100])
def test_half_precision_is_summed_in_single(chunk: int) -> None:
    hidden, head, labels, lesson = tensors()
    settings = Distil(temperature=2.0, cross_entropy=0.5, hidden=0.3)
    halved = Lesson(lesson.hidden.bfloat16(), lesson.head.bfloat16())
    limit = chunk * VOCABULARY
    found = loss(hidden.bfloat16(), head.bfloat16(), labels, halved, settings, logits=limit)
    expected = loss(hidden, head, labels, lesson, settings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, (hidden, head)),
        torch.autograd.grad(expected, (hidden, head)),
        strict=True,
    ):
        assert (one - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_is_the_one_of_torch(temperature: float) -> None:
    draw = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(5, VOCABULARY, generator=draw) for _ in range(2))
    expected = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).softmax(-1),
        reduction="sum",
    )
    torch.testing.assert_close(forward_kl(student, teacher, temperature), expected)
    assert forward_kl(student, teacher) != pytest.approx(forward_kl(teacher, student).item())


def test_forward_kl_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    teacher = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    q = torch.tensor([1.0, 3.0]).softmax(-1)
    expected = (0.5 * torch.log(0.5 / q)).sum()  # the first position adds nothing
    assert forward_kl(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_hidden_states_are_compared_on_the_leading_channels() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0, 50.0]])
    assert hidden_distance(student, teacher).item() == pytest.approx(0.5)


def test_targets_are_predicted_by_the_position_before() -> None:
    said = torch.arange(8.0).view(1, 4, 2)
    targets = torch.tensor([[False, False, True, True]])
    assert predicting(said, targets).tolist() == [[2.0, 3.0], [4.0, 5.0]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["full", "small"])
def test_the_loss_of_a_size_is_that_of_the_stock_models(family: str, size: str) -> None:
    """Heads tied or not: what the parts hand over gives the stock logits' own loss."""
    student, parent, batch = elastic(family, seed=1), elastic(family), one_batch()
    settings = Distil(temperature=1.5, cross_entropy=0.25)
    fields = student.sizes[size].config
    parts = Parts(student.layout, student.state)
    lesson = Teacher(Parts(parent.layout, parent.state)).lesson(batch)
    labels = batch.input_ids[:, 1:][batch.targets[:, 1:]]

    def finish(hidden: Tensor, head: Tensor) -> Tensor:
        states = predicting(hidden, batch.targets)
        return loss(states, head, labels, lesson, settings, logits=5 * len(head))

    cut = Narrowed(student.layout, student.layout.sizes_of(fields))
    with torch.no_grad():
        found = parts(parts.skeleton(fields), cut, finish, **batch.inputs)
        said, taught = (
            predicting(stock.use_chunk_scan(model)(**batch.inputs, use_cache=False).logits, where)
            for model, where in ((student[size], batch.targets), (parent.parent, batch.targets))
        )
    expected = F.kl_div(
        (said / 1.5).log_softmax(-1), (taught / 1.5).softmax(-1), reduction="batchmean"
    )
    expected = 1.5**2 * expected + 0.25 * F.cross_entropy(said, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
