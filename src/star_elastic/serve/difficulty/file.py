"""The fitted model of difficulty and its file, `difficulty.json`.

A router tells for each size how likely its answer is good: logistic regressions on standardized
features. A request's difficulty is the chance that the largest size gains over the smallest one:
the difference of their probabilities, from -1 to 1, and about 0 for what is routine as well as for
what no size can do. The table says from which difficulty on which size is worth its price.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from star_elastic.folder import CheckpointError, atomic_file, read_json
from star_elastic.serve.difficulty.features import NAMES, PROBE, Probe, features
from star_elastic.submodel import Strict

NAME = "difficulty.json"
NEVER = 2.0  # no difficulty is so high; JSON has no infinity
MOST_DEVIATIONS = 8.0  # from a feature's mean: one that nothing was fitted on counts as no more
_MAX_FILE = 2**20
_MAX_SIZES = 64

Name = Annotated[str, Field(min_length=1, max_length=64)]
Weight = Annotated[float, Field(ge=-1e6, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
Threshold = Annotated[float, Field(ge=-NEVER, le=NEVER)]


class Feature(Strict):
    """One input: standardized by mean and scale, then weighted for each size (smallest first)."""

    name: str
    mean: float = Field(ge=-1e9, le=1e9)
    scale: float = Field(ge=1e-6, le=1e9)
    weights: list[Weight] = Field(max_length=_MAX_SIZES)


class Router(Strict):
    """The probability of each size's answer to be good, from so many tokens of a probe (or 0)."""

    probe_tokens: int = Field(ge=0, le=1024)
    bias: list[Weight] = Field(max_length=_MAX_SIZES)
    features: list[Feature] = Field(max_length=len(NAMES))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [feature.name for feature in self.features]
        for feature in self.features:
            if feature.name not in NAMES or names.count(feature.name) > 1:
                raise ValueError(f"feature {feature.name[:80]!r} is unknown, or there twice")
            if feature.name in PROBE and not self.probe_tokens:
                raise ValueError(f"feature {feature.name} needs a probe, and probe_tokens is 0")
            if len(feature.weights) != len(self.bias):
                raise ValueError(f"feature {feature.name}: not one weight for each bias")
        return self

    def probabilities(self, known: Mapping[str, float]) -> list[float]:
        """Of each size, smallest first; features that are not known count as average."""
        scores = list(self.bias)
        for feature in self.features:
            at = (known.get(feature.name, feature.mean) - feature.mean) / feature.scale
            at = max(-MOST_DEVIATIONS, min(MOST_DEVIATIONS, at))
            scores = [s + w * at for s, w in zip(scores, feature.weights, strict=True)]
        return [_sigmoid(score) for score in scores]


class Interval(Strict):
    """A measured figure and its 95 % interval."""

    low: float
    mean: float
    high: float


class Setting(Strict):
    """What to do so that requests cost a share of what all would at the largest size.

    `thresholds`: for each size above the smallest the least difficulty that it answers. `accuracy`,
    `random` (sizes mixed at random at the same cost) and the 95 % interval of the difference were
    measured on held-out requests, where they cost `cost_share`.
    """

    share: float = Field(gt=0, le=1)
    probe_tokens: int = Field(ge=0)
    thresholds: list[Threshold]
    cost_share: float = Field(ge=0, le=1e6)
    accuracy: Share
    random: Share
    difference: Interval


class Provenance(Strict):
    """How the model came about.

    `auc`: the chance that of two held-out requests, of which only one gains from
    the largest size, it has the higher difficulty; by `probe_tokens`.
    `calibration_error`: mean distance of predicted from true, of the smallest size's accuracy.
    """

    checkpoint: str = Field(max_length=4096)
    fitted: int = Field(ge=0)
    held_out: int = Field(ge=0)
    gained: int = Field(ge=0)  # requests of both that the largest size did better
    seed: int
    auc: dict[str, Interval]
    calibration_error: dict[str, Share]


class Difficulty(Strict):
    """The whole file. `sizes` are ordered from the smallest to the largest."""

    format_version: Literal[1] = 1
    sizes: list[Name] = Field(min_length=2, max_length=_MAX_SIZES)
    routers: list[Router] = Field(min_length=1, max_length=16)
    table: list[Setting] = Field(min_length=1, max_length=1000)
    provenance: Provenance

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.sizes)) != len(self.sizes):
            raise ValueError(f"sizes: two have the same name: {self.sizes}")
        probes = [router.probe_tokens for router in self.routers]
        if len(set(probes)) != len(probes):
            raise ValueError(f"routers: two have the same probe_tokens: {probes}")
        for n, router in enumerate(self.routers):
            if len(router.bias) != len(self.sizes):
                raise ValueError(f"routers.{n}.bias: {len(router.bias)} for {self.sizes}")
        for n, setting in enumerate(self.table):
            self._check_setting(f"table.{n}", setting, probes)
        shares = [setting.share for setting in self.table]
        if shares != sorted(set(shares)):
            raise ValueError(f"table: shares do not rise: {shares}")
        return self

    def _check_setting(self, where: str, setting: Setting, probes: list[int]) -> None:
        if setting.probe_tokens not in probes:
            raise ValueError(f"{where}.probe_tokens: no router has {setting.probe_tokens}")
        if len(setting.thresholds) != len(self.sizes) - 1:
            raise ValueError(f"{where}.thresholds: {setting.thresholds} for {self.sizes}")
        if setting.thresholds != sorted(setting.thresholds):
            raise ValueError(f"{where}.thresholds: {setting.thresholds} fall; sizes would be idle")

    def setting(self, share: float) -> Setting:
        """The dearest one within a share of the cost.

        Raises:
            ValueError: even the cheapest costs more, or it is no share.
        """
        within = [setting for setting in self.table if setting.share <= share + 1e-9]
        if not within or not share <= 1:
            least = self.table[0].share
            raise ValueError(f"difficulty: a share of {share:g}; from {least:g} to 1 is possible")
        return within[-1]

    def thresholds(self, share: float) -> dict[str, float]:
        """What `policy.ByDifficulty` takes: a size's name -> the least difficulty it answers.

        Raises:
            ValueError: as `setting`.
        """
        return dict(zip(self.sizes[1:], self.setting(share).thresholds, strict=True))

    def of(self, text: str, prompt_tokens: int, probe: Probe = (), probe_tokens: int = 0) -> float:
        """A request's difficulty, -1 to 1.

        Args:
            probe: the likeliest tokens' log probabilities, see `features`; fewer tokens than
                `probe_tokens` if the answer ended before.
            probe_tokens: those of the setting; says which router is asked.

        Raises:
            ValueError: no router reads so many tokens of a probe, or there is no probe.
        """
        routers = {router.probe_tokens: router for router in self.routers}
        if probe_tokens not in routers:
            raise ValueError(f"probe_tokens {probe_tokens}: there are routers for {list(routers)}")
        if probe_tokens and not probe:
            raise ValueError(f"probe: empty, and the router reads {probe_tokens} tokens of it")
        known = features(text, prompt_tokens, probe[:probe_tokens])
        chances = routers[probe_tokens].probabilities(known)
        return chances[-1] - chances[0]


def save(difficulty: Difficulty, path: str | Path, overwrite: bool = False) -> None:
    """Write the file, all of it or nothing.

    Raises:
        FileExistsError: it is there and `overwrite` is false.
    """
    with atomic_file(Path(path), overwrite) as partial:
        partial.write_text(difficulty.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load(path: str | Path) -> Difficulty:
    """Read a file that nobody vouches for.

    Raises:
        CheckpointError: unreadable or malformed; naming the file, the field and its value.
    """
    path = Path(path)
    try:
        return Difficulty.model_validate(read_json(path, _MAX_FILE))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":  # ours tell the value themselves
            reason += f", not {_short(first['input'])}"
        raise CheckpointError(f"{path}: {where + ': ' if where else ''}{reason}"[:600]) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, score))))
