"""A recipe: everything a run needs, as strict models read from YAML. Unknown keys are errors."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from star_elastic.folder import one_line
from star_elastic.submodel import Strict


class RecipeError(ValueError):
    """A recipe that cannot be run: one line naming file, field and value."""


class Data(Strict):
    """JSONL files of prompt/completion, question/answer or text records."""

    train: str
    heldout: str
    max_length: int = Field(default=512, ge=8)  # tokens; longer records are cut
    loss_on: Literal["all", "completion"] = "all"


class Rank(Strict):
    """The calibration pass that orders units."""

    samples: int = Field(default=512, ge=1)


class Optimise(Strict):
    """The training loop. A step is `accumulate` micro-batches, each at one size drawn."""

    steps: int = Field(ge=1)
    tokens: int = Field(default=4096, ge=16)  # per micro-batch, padding included
    accumulate: int = Field(default=1, ge=1)
    size_probs: dict[str, float] | None = None  # default: all sizes alike
    learning_rate: float = Field(default=1e-4, gt=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)  # of the peak, at the last step
    warmup_steps: int = Field(default=50, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)  # norm of the whole gradient
    balance_rate: float = Field(default=0.0, ge=0)  # step of the gate's load-balancing bias
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    save_every: int = Field(default=200, ge=1)  # steps


class Init(Strict):
    """A parent made from nothing: a stock config, and the tokenizer of some folder."""

    config: dict[str, Any]
    tokenizer: str
    seed: int = 0


class Alone(Strict):
    """How the baseline is trained: each size by itself from random weights."""

    learning_rate: float = Field(default=1e-3, gt=0)
    balance_rate: float = Field(default=0.0, ge=0)


class Recipe(Strict):
    """One run. With `parent`, sizes are distilled from it; with `init`, it is trained alone."""

    name: str = "recipe"
    parent: str | None = None
    init: Init | None = None
    data: Data
    sizes: dict[str, dict[str, int] | float] = {"full": 1.0}  # fields, or share of active
    multiple_of: dict[str, int] = {}
    rank: Rank = Rank()
    train: Optimise
    alone: Alone = Alone()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.parent is None) == (self.init is None):
            raise ValueError("say either parent or init")
        probs = self.train.size_probs
        if probs is not None:
            if unknown := set(probs) - set(self.sizes):
                raise ValueError(f"train.size_probs names {min(unknown)!r}, which is not a size")
            if min(probs.values()) < 0 or sum(probs.values()) <= 0:
                raise ValueError("train.size_probs must be positive")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe; `overrides` are `train.steps=100`, values in YAML.

    Raises:
        RecipeError: unreadable, an unknown key (names the closest), a value out of bounds.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a mapping")
    for override in overrides:
        key, found, value = override.partition("=")
        if not found:
            raise RecipeError(f"--set {override}: not of the form key=value")
        try:
            _put(values, key, yaml.safe_load(value))
        except (yaml.YAMLError, TypeError) as error:
            raise RecipeError(f"--set {override}: {one_line(error)}") from None
    values.setdefault("name", Path(path).stem)
    try:
        return Recipe.model_validate_json(json.dumps(values))
    except TypeError as error:  # YAML has dates, recipes have not
        raise RecipeError(f"{path}: {error}") from None
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_line(error)}") from None


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise TypeError(f"{part} is not a mapping")
    values[leaf] = value


def _first_line(error: ValidationError) -> str:
    errors = error.errors()  # a misspelt key that is required is missing, too: say the misspelling
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where or 'recipe'}: {first['msg']} (got {first['input']!r:.80})"
    model: Any = Recipe
    for part in first["loc"][:-1]:
        model = model.model_fields[str(part)].annotation
        inner = (a for a in getattr(model, "__args__", ()) if hasattr(a, "model_fields"))
        model = next(inner, model)
    close = difflib.get_close_matches(str(first["loc"][-1]), model.model_fields, n=1, cutoff=0)
    return f"{where}: unknown key; did you mean {close[0]!r}?"
