"""What the sizes learn from: the parent or another model, and how far they are from it."""

from pathlib import Path
from typing import Any

import pytest
from models import letters_tokenizer, tiny
from runs import STAGE, logged, make_data, recipe

from star_elastic.train.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, and other models that might teach."""
    folder = make_data(tmp_path_factory.mktemp("teacher"))
    tiny("llama", seed=2).save_pretrained(folder / "dense")
    tiny("llama", vocab_size=80).save_pretrained(folder / "wider")
    tiny("llama").save_pretrained(folder / "foreign")
    tokenizer = letters_tokenizer()
    for name in ("dense", "wider"):
        tokenizer.save_pretrained(folder / name)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder / "foreign")
    return folder


def first_loss(folder: Path, out: Path, size: str, **distil: Any) -> float:
    """The loss of a size in the first step of a run."""
    stage = STAGE | {"steps": 1, "size_probs": {size: 1.0}}
    train(recipe(folder, distil=distil, train={"stages": [stage]}), out)
    return logged(out)[0]["losses"][size]


def test_the_parent_has_nothing_to_learn_from_itself(folder: Path, tmp_path: Path) -> None:
    assert first_loss(folder, tmp_path / "full", "full") == pytest.approx(0, abs=1e-6)
    assert first_loss(folder, tmp_path / "small", "small") > 0.01


@pytest.mark.parametrize("name", ["other", "dense"])
def test_another_teacher_teaches(folder: Path, tmp_path: Path, name: str) -> None:
    """Of another family, too, if it has the vocabulary; held in host memory, the same."""
    teacher = str(folder / name)
    found = first_loss(folder, tmp_path / "other", "full", teacher=teacher)
    again = first_loss(folder, tmp_path / "host", "full", teacher=teacher, offload=True)
    assert found > 0.1 and again == found


@pytest.mark.parametrize(
    ("name", "hidden", "message"),
    [
        ("other", 1.0, "another teacher's hidden states are not the parent's"),
        ("wider", 0.0, "vocabulary 80, the parent's is 64"),
        ("foreign", 0.0, "has another tokenizer than the parent"),
    ],
)
def test_a_teacher_that_cannot_teach(
    folder: Path, tmp_path: Path, name: str, hidden: float, message: str
) -> None:
    distil = {"teacher": str(folder / name), "hidden": hidden}
    with pytest.raises(ValueError, match=message) as error:
        train(recipe(folder, distil=distil), tmp_path / "out")
    assert str(error.value).startswith("distil.") and "\n" not in str(error.value)


def test_the_next_token_counts_as_much_as_told(folder: Path, tmp_path: Path) -> None:
    """The full size is no distance from the teacher: what is left is that term."""
    half, whole = (
        first_loss(folder, tmp_path / str(weight), "full", cross_entropy=weight)
        for weight in (0.5, 1.0)
    )
    assert half > 1 and whole == pytest.approx(2 * half, rel=1e-5)


def test_hidden_states_count_as_much_as_told(folder: Path, tmp_path: Path) -> None:
    none, half, whole = (
        first_loss(folder, tmp_path / str(weight), "small", hidden=weight)
        for weight in (0.0, 0.5, 1.0)
    )
    assert half > none + 0.01
    assert whole - none == pytest.approx(2 * (half - none), rel=1e-4)


def test_temperature_softens(folder: Path, tmp_path: Path) -> None:
    """Near infinity, temperature^2 * KL is half the logits' squared distance: it converges."""
    sharp, soft, softer = (
        first_loss(folder, tmp_path / str(t), "small", temperature=t) for t in (1.0, 100.0, 200.0)
    )
    assert softer == pytest.approx(soft, rel=0.02)
    assert sharp != pytest.approx(soft, rel=0.05)
