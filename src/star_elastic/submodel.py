"""What a checkpoint says about itself: axes, choices, and the named submodels nested inside it.

These are the models of `elastic_config` in `config.json` (docs/format.md). A submodel is a smaller
config, nothing else: a set of config fields, each at most the parent's.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from star_elastic.layout import Layout
from star_elastic.shapes import at
from star_elastic.symbols import DEPTH

FORMAT_VERSION = 1
Fields = Mapping[str, int | list[int]]  # config fields; a list has one value per parent's layer
_WHOLE = ("hidden_size", DEPTH)  # fields that no two layers can differ in
# What is held against the parent takes a second at most: choices in all, and tensors of all sizes.
_MAX_CHOICES, _MAX_COUNTED, _MAX_KEYS = 2**12, 2**16, 2**16
Integers = Annotated[list[int], Field(fail_fast=True)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; instances never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Axis(Strict):
    """One config field that may shrink: the sizes it may take, and their common divisor."""

    choices: Integers = Field(min_length=1)
    multiple_of: int = Field(default=1, ge=1)


class Submodel(Strict):
    """A named size: the fields in which it differs from the parent, what it costs, how good it is.

    `quality` is {task: {metric: value}}, as measured; empty if nobody measured.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    config: dict[str, int | Integers] = {}
    total_params: int
    active_params: int
    trained: bool
    quality: dict[str, dict[str, float]] = {}


class Training(Strict):
    """Which run made the sizes: enough to cite it. One made elsewhere tells no steps, no tokens."""

    recipe: str
    steps: int | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)

    @property
    def is_ours(self) -> bool:
        """Was it this package's? Else the sizes were declared by `adopt`, on its word."""
        return self.steps is not None


class ElasticSpace(Strict):
    """The whole of `elastic_config`."""

    format_version: Literal[1] = FORMAT_VERSION
    axes: dict[str, Axis]
    layer_order: Integers | None = None
    submodels: list[Submodel] = Field(min_length=1, fail_fast=True)
    training: Training | None = None
    digests: dict[str, Digest] = {}  # file name -> "sha256:..."

    @classmethod
    def of(
        cls,
        layout: Layout,
        sizes: Mapping[str, Fields],
        trained: bool = False,
        training: Training | None = None,
        multiple_of: Mapping[str, int] | None = None,
    ) -> "ElasticSpace":
        """The space spanned by some named sizes, e.g. {"full": {}, "small": {"hidden_size": 64}}.

        Raises:
            ValueError: a size this parent cannot hold; see `check_fields`.
        """
        multiple_of = multiple_of or {}
        axes: dict[str, Axis] = {}
        for field in layout.axes:
            choices = {n for fields in sizes.values() for n in _values(fields.get(field, []))}
            if choices:
                choices.add(layout.sizes[field])
                divisor = multiple_of.get(field, 1)
                axes[field] = Axis(choices=sorted(choices), multiple_of=divisor)
        submodels = [
            submodel(layout, name, fields, trained=trained) for name, fields in sizes.items()
        ]
        space = cls(
            axes=axes, submodels=submodels, training=training, layer_order=layout.layer_order
        )
        space.check(layout)
        return space

    @property
    def sizes(self) -> dict[str, Submodel]:
        """The named submodels, in the order they were declared."""
        return {submodel.name: submodel for submodel in self.submodels}

    def check(self, layout: Layout) -> None:
        """Hold this declaration against the parent it came with.

        Raises:
            ValueError: naming the field and the value that cannot be.
        """
        self._check_amount(layout)
        for field, axis in self.axes.items():
            for choice in axis.choices:
                _check_choice(layout, field, choice, axis.multiple_of)
        if len(self.sizes) != len(self.submodels):
            raise ValueError("submodels: two have the same name")
        for each in self.submodels:
            where = f"submodels.{each.name}"
            for field, value in each.config.items():
                if field not in self.axes:
                    raise ValueError(f"{where}: {field[:80]} is not among the axes declared")
                if not {*_values(value)} <= {*self.axes[field].choices}:
                    raise ValueError(
                        f"{where}: {field} = {str(value)[:80]} is not among its choices"
                    )
            honest = submodel(layout, each.name, each.config, each.trained)
            for count in ("total_params", "active_params"):
                said, true = getattr(each, count), getattr(honest, count)
                if said != true:
                    raise ValueError(
                        f"{where}: {count} says {str(said)[:40]}, the shapes say {true}"
                    )
        for field, axis in self.axes.items():
            if axis.choices != sorted({*axis.choices}):
                raise ValueError(f"axes.{field}.choices: not ascending, or one twice")

    def _check_amount(self, layout: Layout) -> None:
        if (choices := sum(len(axis.choices) for axis in self.axes.values())) > _MAX_CHOICES:
            raise ValueError(f"axes: {choices} choices; at most {_MAX_CHOICES} are read")
        if (sizes := len(self.submodels)) * len(layout.weights) > _MAX_COUNTED:
            raise ValueError(
                f"submodels: {sizes} sizes of {len(layout.weights)} tensors are too many to count"
            )


def read_declaration(config: Any, declared: Any) -> tuple[Layout, ElasticSpace]:
    """The layout under a declared order of layers, and the space held against it.

    Args:
        config: the parent's; declared: `elastic_config` as JSON has it.

    Raises:
        ValueError: naming the field, and the value that cannot be.
    """
    if isinstance(declared, dict) and declared.get("format_version") != FORMAT_VERSION:
        said = repr(declared.get("format_version"))[:80]
        raise ValueError(f"elastic_config.format_version: unknown version {said}")
    _check_keys(declared)
    try:
        space = ElasticSpace.model_validate(declared)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part)[:80] for part in ("elastic_config", *first["loc"]))
        raise ValueError(f"{field}: {first['msg']}") from None
    try:
        layout = Layout(config, space.layer_order)
        space.check(layout)
    except ValueError as error:
        raise ValueError(f"elastic_config: {error}") from None
    return layout, space


def _check_keys(declared: Any) -> None:
    """Every unknown key would become an error of its own, in memory."""
    maps, keys = [declared] if isinstance(declared, dict) else [], 0
    while maps:
        inner = maps.pop()
        keys += len(inner) if isinstance(inner, dict) else 0
        values = inner.values() if isinstance(inner, dict) else inner
        maps += [each for each in values if isinstance(each, dict | list)]
        if keys > _MAX_KEYS:
            raise ValueError(f"elastic_config: more than {_MAX_KEYS} keys")


def submodel(layout: Layout, name: str, fields: Fields, trained: bool) -> Submodel:
    """A submodel with its counts, after checking that this parent holds it.

    The whole parent is as trained as it came: reordering does not change what it computes.
    """
    check_fields(layout, fields)
    sizes = layout.sizes_of(fields)
    return Submodel(
        name=name,
        config=dict(fields),
        total_params=layout.count(sizes),
        active_params=layout.count_active(sizes),
        trained=trained or not fields,
    )


def check_fields(layout: Layout, fields: Fields) -> None:
    """Can this parent hold a submodel with these fields?

    Raises:
        ValueError: an axis the family (or this model) does not have, a value above the parent's or
            below one, heads that do not fill their groups, fewer experts than a token uses, values
            per layer where there can be one only.
    """
    layers = len(layout.blocks)
    for field, value in fields.items():
        if isinstance(value, list) and (field in _WHOLE or len(value) != layers):
            many = "one value" if field in _WHOLE else f"{layers} values, one per layer"
            raise ValueError(f"{field[:80]} = {str(value)[:80]}: it takes {many}")
        for each in _values(value):
            _check_choice(layout, field, each)
    sizes = layout.sizes_of(fields)
    experts, top_k = layout.family.experts, layout.family.top_k
    if experts in layout.axes:
        for layer in range(layers):
            have, use = at(sizes, layer)[experts], at(sizes, layer)[top_k]
            if have < use:
                raise ValueError(f"{experts} = {have} is fewer than {top_k} = {use}")


def per_layer(fields: Fields) -> dict[str, list[int]]:
    """The fields that are given per layer; stock classes can express none of them."""
    return {field: value for field, value in fields.items() if isinstance(value, list)}


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_choice(layout: Layout, field: str, value: Any, multiple_of: int = 1) -> None:
    if field == DEPTH and layout.layer_order is None and value != layout.sizes[DEPTH]:
        raise ValueError(f"{DEPTH}: this model has no layer_order; rank its layers first")
    if field not in layout.axes and field != DEPTH:
        raise ValueError(
            f"{field[:80]} is no axis of this {layout.family.model_type} model; "
            f"its axes are {', '.join(layout.axes)}"
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} = {value!r} is not a positive integer")
    if value > layout.sizes[field]:
        raise ValueError(
            f"{field} = {str(value)[:40]} is larger than the parent's {layout.sizes[field]}"
        )
    if value % multiple_of and value != layout.sizes[field]:
        raise ValueError(f"{field} = {value} is not a multiple of {multiple_of}")
    layout.sizes_of({field: value})  # ratios must divide
