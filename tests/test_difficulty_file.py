"""`difficulty.json`: written whole, read with suspicion; what may be asked of it."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_difficulty import known

from star_elastic.folder import CheckpointError
from star_elastic.serve.difficulty import Difficulty, load, save
from star_elastic.serve.difficulty.fitting import fit
from star_elastic.serve.difficulty.logistic import Logistic


@pytest.fixture(scope="module")
def fitted() -> Difficulty:
    return fit(known(300), [0, 4], checkpoint="somewhere")


@pytest.fixture
def values(fitted: Difficulty) -> dict[str, Any]:
    return copy.deepcopy(fitted.model_dump(mode="json"))


def test_what_is_written_is_read(fitted: Difficulty, tmp_path: Path) -> None:
    path = tmp_path / "difficulty.json"
    save(fitted, path)
    assert load(path) == fitted
    assert path.stat().st_size < 40_000
    with pytest.raises(FileExistsError):
        save(fitted, path)
    save(fitted, path, overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["difficulty.json"]


def spoiled(values: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """The same with one value replaced; `place` is its path, dotted."""
    at: Any = values
    *way, last = place.split(".")
    for step in way:
        at = at[int(step) if isinstance(at, list) else step]
    at[int(last) if isinstance(at, list) else last] = value
    return values


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("format_version", 2, "format_version: Input should be 1, not 2"),
        ("sizes", ["a"], "sizes: List should have at least 2 items"),
        ("sizes", ["a", "b", "a"], r"two have the same name: \['a', 'b', 'a'\]"),
        ("sizes.0", 7, "sizes.0: Input should be a valid string, not 7"),
        ("routers", [], "routers: List should have at least 1 item"),
        ("routers.0.bias.0", math.nan, "routers.0.bias.0: Input should be a .* number, not nan"),
        ("routers.0.bias.0", math.inf, "routers.0.bias.0: .*, not inf"),
        ("routers.0.bias", [0.0, 1.0], "routers.0: feature log_characters: not one weight"),
        ("routers.0.features.1.scale", 0.0, "routers.0.features.1.scale: .*, not 0.0"),
        ("routers.0.features.1.mean", "x", "routers.0.features.1.mean: .*, not 'x'"),
        ("routers.0.features.1.weights.2", 1e300, "weights.2: .*, not 1e[+]300"),
        ("routers.0.features.1.name", "mood", "routers.0: feature 'mood' is unknown"),
        ("routers.0.features.1.name", "log_characters", "'log_characters' is unknown, or there t"),
        ("routers.0.features.1.name", "mean_entropy", "mean_entropy needs a probe"),
        ("routers.1.probe_tokens", 0, "routers.1: feature first_logprob needs a probe"),
        ("routers.1.probe_tokens", True, "routers.1.probe_tokens: .*, not True"),
        ("table.0.probe_tokens", 3, "table.0.probe_tokens: no router has 3"),
        ("table.2.thresholds", [0.1], r"table.2.thresholds: \[0.1\] for"),
        ("table.2.thresholds", [0.5, 0.1], r"table.2.thresholds: \[0.5, 0.1\] fall"),
        ("table.2.thresholds.0", math.nan, "table.2.thresholds.0: .*, not nan"),
        ("table.2.share", 0.99, "table: shares do not rise"),
        ("table.2.accuracy", 1.5, "table.2.accuracy: .*, not 1.5"),
        ("table.2.difference", [0, 0, 0], "table.2.difference: "),
        ("provenance.auc.0.low", None, "provenance.auc.0.low: .*, not None"),
        ("mood", 1, "mood: Extra inputs are not permitted, not 1"),
    ],
)
def test_a_spoiled_file_is_one_error(
    values: dict[str, Any], tmp_path: Path, place: str, value: Any, complaint: str
) -> None:
    path = tmp_path / "difficulty.json"
    path.write_text(json.dumps(spoiled(values, place, value)))
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) <= 600


@pytest.mark.parametrize("text", ["", "[]", "{", '{"sizes": 1, "sizes": 1}', "[" * 10**5])
def test_what_is_no_such_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "difficulty.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="difficulty.json"):
        load(path)
    with pytest.raises(CheckpointError, match="other.json"):
        load(tmp_path / "other.json")


def test_a_setting_is_the_dearest_within_the_share(fitted: Difficulty) -> None:
    shares = [setting.share for setting in fitted.table]
    assert fitted.setting(shares[3]) is fitted.table[3]
    assert fitted.setting((shares[3] + shares[4]) / 2) is fitted.table[3]
    assert fitted.setting(1.0) is fitted.table[-1]
    for share in (shares[0] - 0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match="from .* to 1 is possible"):
            fitted.setting(share)
    told = fitted.thresholds(shares[3])
    assert list(told) == ["middle", "full"] and told["middle"] <= told["full"]


def test_a_probe_must_fit_the_router(fitted: Difficulty) -> None:
    probe = [[-0.1, -3.0]] * 6
    assert fitted.of("2+2", 3, probe, 4) == fitted.of("2+2", 3, probe[:4], 4)
    assert fitted.of("2+2", 3, probe) == fitted.of("2+2", 3)
    assert -1 < fitted.of("7" * 10**6, 10**6, [[-math.inf]], 4) < 1
    with pytest.raises(ValueError, match=r"there are routers for \[0, 4\]"):
        fitted.of("2+2", 3, probe, 2)
    with pytest.raises(ValueError, match="probe: empty"):
        fitted.of("2+2", 3, [], 4)


def test_the_file_tells_what_was_fitted(fitted: Difficulty) -> None:
    """Plain Python and the fit agree, far outside of what was fitted too."""
    outcomes = known(300)
    router = fitted.routers[0]
    used, x_nf = outcomes.features(0)
    told = np.array([router.probabilities(dict(zip(used, x_f, strict=True))) for x_f in x_nf])
    model = Logistic(
        np.array([feature.mean for feature in router.features]),
        np.array([feature.scale for feature in router.features]),
        np.array([feature.weights for feature in router.features]),
        np.array(router.bias),
    )
    assert np.abs(told - model.probabilities(x_nf)).max() < 1e-12
    far = dict.fromkeys(used, 1e9)
    expected = model.probabilities(np.full((1, len(used)), 1e9))[0]
    assert router.probabilities(far) == pytest.approx(expected.tolist())
