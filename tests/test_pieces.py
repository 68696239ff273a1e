"""Rows in pieces: the same step, in less memory."""

import pytest
import torch
from models import layout_of, same
from torch import Tensor
from training import one_batch, stream, trainer, weights

from star_elastic.records import Batch
from star_elastic.train.distillation import Lesson
from star_elastic.train.pieces import in_pieces, piece_count
from star_elastic.train.recipe import Stage
from star_elastic.train.trainer import Trainer


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_pieces_are_all_rows_in_order(count: int) -> None:
    batch = next(stream(rows=4))
    pieces = batch.split(count)
    assert len(pieces) == min(count, 4)
    for name in ("input_ids", "mask", "targets", "documents"):
        whole = torch.cat([getattr(piece, name) for piece in pieces])
        assert torch.equal(whole, getattr(batch, name))
    plain = Batch(batch.input_ids, batch.mask, batch.targets)
    assert all(piece.documents is None for piece in plain.split(count))


def test_each_piece_has_its_share_of_the_lesson() -> None:
    batch = next(stream(rows=4))
    positions = int(batch.targets[:, 1:].sum())
    lesson = Lesson(torch.arange(positions)[:, None].float(), torch.zeros(1, 1))
    found = list(in_pieces(batch, lesson, 3))
    taught = [part.hidden for _, part, _ in found if part is not None]
    assert torch.equal(torch.cat(taught), lesson.hidden)
    for (piece, _, share), hidden in zip(found, taught, strict=True):
        assert len(hidden) == int(piece.targets[:, 1:].sum()) == round(share * positions)
    assert sum(share for _, _, share in found) == pytest.approx(1)


def test_only_sizes_above_the_mean_are_split() -> None:
    layout = layout_of("llama")
    sizes = {"full": {}, "small": {"hidden_size": 8, "intermediate_size": 8}}
    stage = Stage(steps=1, rows=4)
    assert piece_count(layout, stage, sizes, {}) == 2
    assert piece_count(layout, stage, sizes, sizes["small"]) == 1
    only = stage.model_copy(update={"size_probs": {"full": 1.0}})
    assert piece_count(layout, only, sizes, {}) == 1
    rare = stage.model_copy(update={"size_probs": {"full": 0.01, "small": 1.0}})
    assert piece_count(layout, rare, sizes, {}) == 4  # no more pieces than rows


@pytest.mark.parametrize("family", ["nemotron_h", "llama-tied"])
def test_a_step_in_pieces_is_the_step(family: str) -> None:
    """Gradients and reported losses; they differ by rounding only, but they do."""
    gradients: list[dict[str, Tensor]] = []
    losses = []
    for split in (True, False):
        changes = {"accumulate": 4, "size_probs": {"full": 0.5, "small": 0.5}, "clip": 1e9}
        trained = trainer(family, teach=True, split=split, **changes)

        def keep(*_: object, trained: Trainer = trained) -> None:
            held = trained.weights.items()
            gradients.append({n: t.grad.clone() for n, t in held if t.grad is not None})

        trained.optimizer.register_step_pre_hook(keep)
        losses.append(trained.step().losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7) and "full" in losses[0]
    found, expected = gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert any(not torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_one_piece_changes_nothing() -> None:
    whole = [trainer("llama", size_probs={"full": 1.0}, steps=3, split=s) for s in (True, False)]
    for each in whole:
        each.run()
    same(weights(whole[0]), weights(whole[1]))
    assert one_batch().tokens > 0
