"""A recipe: everything a run needs, as strict models read from YAML. Unknown keys are errors."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from star_elastic.folder import one_line
from star_elastic.precision import Format, INT8Groups, format_of
from star_elastic.submodel import Strict
from star_elastic.train.slips import first_line, put

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class RecipeError(ValueError):
    """A recipe that cannot be run: one line naming file, field and value."""


class Section(Strict, allow_inf_nan=False):
    """Part of a recipe: no number is infinite or none."""


class Corpus(Section):
    """One source of training text: JSONL, a dataset folder, or a dataset of the hub."""

    path: str
    split: str = "train"
    weight: float = Field(default=1.0, gt=0)  # its share of the documents drawn
    loss_on: Literal["all", "completion"] = "all"


class Data(Section):
    """Training text, one corpus or a mix by name, and held-out records (JSONL)."""

    train: str | Annotated[dict[str, Corpus], Field(min_length=1)]
    heldout: str
    loss_on: Literal["all", "completion"] = "all"  # where `train` is one path

    @property
    def corpora(self) -> dict[str, Corpus]:
        """The mix, by name."""
        if isinstance(self.train, str):
            return {"train": Corpus(path=self.train, loss_on=self.loss_on)}
        return self.train


class Rank(Section):
    """The calibration pass that orders units, and layers if asked."""

    samples: int = Field(default=512, ge=1)
    order: Literal["importance", "random"] = "importance"
    depth: bool = False  # rank layers too, so that sizes may have fewer
    min_layers: int = Field(default=1, ge=1)
    one_block: bool = False  # hold one block of the parent at a time


class Stage(Section):
    """A stretch of training. A step is `accumulate` micro-batches of `rows` packed rows."""

    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)  # instead of steps
    sequence_length: int = Field(default=512, ge=8)
    rows: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)  # of all processes together
    size_probs: dict[str, float] | None = None  # default: all sizes alike
    mix: dict[str, float] | None = None  # other weights of the corpora
    learning_rate: float = Field(default=1e-4, gt=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)  # of the peak, at the stage's last step
    warmup_steps: int = Field(default=50, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> "Stage":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("say either steps or tokens")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step, padding included."""
        return self.sequence_length * self.rows * self.accumulate

    @property
    def length(self) -> int:
        """Steps of this stage."""
        return self.steps or max(1, round((self.tokens or 0) / self.tokens_per_step))


class Distil(Section):
    """What the sizes learn from, and how far they are from it."""

    teacher: str | None = None  # another model of the same vocabulary; default: the frozen parent
    offload: bool = False  # the teacher rests in host memory, a block at a time on the device
    temperature: float = Field(default=1.0, gt=0)
    cross_entropy: float = Field(default=0.0, ge=0)  # weight of the next-token loss
    hidden: float = Field(default=0.0, ge=0)  # weight of the last hidden states' distance


class Balance(Section):
    """How experts are kept busy while training."""

    rate: float = Field(default=0.0, ge=0)  # step of the sigmoid gate's balancing bias
    aux_loss: float = Field(default=0.0, ge=0)  # weight of the load-balancing loss


class Routing(Section):
    """The router: it learns which size serves a budget. Sizes given as shares are its budgets."""

    axes: dict[str, list[int]] = Field(min_length=1)  # the choices of each axis
    per_layer: list[str] = []  # axes on which layers may differ
    metric: Literal["params", "active", "memory", "latency"] = "active"
    context: int = Field(default=4096, ge=1)  # tokens a sequence, for memory
    batch: int = Field(default=1, ge=1)  # sequences, for memory
    latency_table: str | None = None  # measured on the device that will serve
    every: int = Field(default=32, ge=1)  # one draw in so many trains the router, under masks
    until: float = Field(default=1.0, gt=0, le=1)  # share of the run after which sizes stay
    warmup: int = Field(default=200, ge=0)  # updates on the budget alone, before training
    learning_rate: float = Field(default=1e-2, gt=0)
    width: int = Field(default=256, ge=1)  # of the hidden layer
    temperature: tuple[Positive, Positive] = (1.0, 0.05)  # first and last, geometric in between
    scale: tuple[Positive, Positive] = (1.0, 10.0)  # of the logits, linear in between
    hard: float = Field(default=0.0, ge=0, le=1)  # share of updates on hard masks
    weight: float = Field(default=1.0, ge=0)  # of the budget loss
    dead_zone: float = Field(default=0.05, ge=0)  # relative miss that costs nothing
    anchor: float = Field(default=10.0, ge=0)  # pulls budget 1 to the full size


class Quantize(Section):
    """Train an elastic parent for its codes; the flags that `star-elastic quantize` then gets."""

    format: str
    keep: list[str] = []  # patterns of what stays as it is
    group: int | None = Field(default=None, ge=1)  # columns under a scale of int4, or of int8
    bits: list[int] = []  # of int8 in groups: numbers of bits at which its codes are to be read
    teacher: Literal["own", "full"] = "full"  # each size's own unquantized version, or the parent

    @model_validator(mode="after")
    def _known(self) -> "Quantize":
        self.readings  # noqa: B018  (refuses)
        return self

    @property
    def readings(self) -> list[Format]:
        """The format, once for every number of bits at which its codes are to be read."""
        try:
            form = format_of(self.format, self.group)
            if not self.bits:
                return [form]
            if not isinstance(form, INT8Groups):
                raise ValueError(f"bits {self.bits}: only int8 with a group is read at fewer")
            return [replace(form, read=bits) for bits in self.bits]
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--")) from None


class Optimise(Section):
    """The training loop."""

    stages: list[Stage] = Field(min_length=1)
    sizes_per_batch: int = Field(default=1, ge=1)  # sizes that learn from one micro-batch
    same_size: int = Field(default=1, ge=1)  # micro-batches in a row that share a draw of sizes
    between: float = Field(default=0.0, ge=0, lt=1)  # share of draws at sizes between the named
    split: bool = False  # sizes above the mean take their rows in pieces: memory of the mean size
    rungs: int = Field(default=6, ge=1)  # how many of those, evenly spaced in active parameters
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)  # norm of the whole gradient
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights are float32
    checkpoint_activations: bool = False  # compute blocks again in backward, to save memory
    seed: int = 0
    save_every: int = Field(default=200, ge=1)  # steps

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.length for stage in self.stages)


class Init(Section):
    """A parent made from nothing: a stock config, and the tokenizer of some folder."""

    config: dict[str, Any]
    tokenizer: str
    seed: int = 0


class Alone(Section):
    """How the baseline is trained: each size by itself from random weights."""

    learning_rate: float = Field(default=1e-3, gt=0)
    balance_rate: float = Field(default=0.0, ge=0)


class Recipe(Section):
    """One run. With `parent`, sizes are distilled from it; with `init`, it is trained alone."""

    name: str = "recipe"
    parent: str | None = None
    init: Init | None = None
    data: Data
    sizes: dict[str, dict[str, int | list[int]] | float] = {"full": 1.0}  # fields, or a share
    multiple_of: dict[str, int] = {}
    rank: Rank = Rank()
    router: Routing | None = None
    quantize: Quantize | None = None
    distil: Distil = Distil()
    balance: Balance = Balance()
    train: Optimise
    alone: Alone = Alone()
    report_to: list[Literal["wandb"]] = []  # beside metrics.jsonl and TensorBoard

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.parent is None) == (self.init is None):
            raise ValueError("say either parent or init")
        for number, stage in enumerate(self.train.stages):
            _check_weights(f"train.stages.{number}.mix", stage.mix, self.data.corpora)
        if self.quantize is not None:
            self._check_quantize()
        if self.quantize is None or self.says_sizes:
            self.check_names(self.sizes)
        if self.router is not None and not any(isinstance(s, float) for s in self.sizes.values()):
            raise ValueError("router: no size is given as a share, so there is no budget to learn")
        return self

    @property
    def says_sizes(self) -> bool:
        """Does it name sizes? Otherwise they are an elastic parent's own."""
        return "sizes" in self.model_fields_set

    def check_names(self, sizes: Iterable[str]) -> None:
        """Hold what the training says of sizes against their names.

        Raises:
            ValueError: naming the key.
        """
        sizes = [*sizes]
        for number, stage in enumerate(self.train.stages):
            _check_weights(f"train.stages.{number}.size_probs", stage.size_probs, sizes)
        if self.parent is not None and self.train.sizes_per_batch > len(sizes):
            many = f"{self.train.sizes_per_batch} of {len(sizes)} sizes"
            raise ValueError(f"train.sizes_per_batch: {many}")
        if self.train.between and "between" in sizes:
            raise ValueError("sizes.between: with train.between that stands for nameless sizes")

    def _check_quantize(self) -> None:
        """What needs an order or a choice of sizes of its own is done before."""
        if self.parent is None:
            raise ValueError("quantize: the parent is an elastic checkpoint; `init` makes none")
        for key in ("rank", "router", "multiple_of"):
            if key in self.model_fields_set:
                raise ValueError(f"{key}: with quantize the parent's order and its sizes stay")
        if self.distil.teacher is not None:
            raise ValueError("distil.teacher: with quantize the parent itself teaches")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe; `overrides` are `train.stages.0.steps=100`, values in YAML.

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
            put(values, key.split("."), yaml.safe_load(value))
        except (yaml.YAMLError, TypeError, IndexError) as error:
            raise RecipeError(f"--set {override}: {one_line(error)}") from None
    values.setdefault("name", Path(path).stem)
    try:
        return Recipe.model_validate_json(json.dumps(values))
    except TypeError as error:  # YAML has dates, recipes have not
        raise RecipeError(f"{path}: {error}") from None
    except ValidationError as error:
        raise RecipeError(f"{path}: {first_line(error, Recipe)}") from None


def _check_weights(where: str, weights: dict[str, float] | None, known: Any) -> None:
    if weights is None:
        return
    if unknown := set(weights) - set(known):
        raise ValueError(f"{where} names {min(unknown)!r}; there are {', '.join(known)}")
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"{where} must be positive")
