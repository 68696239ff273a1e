"""`star-elastic adopt`: sizes declared on a nested checkpoint that was made elsewhere."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console

from star_elastic.cli.moving import moving
from star_elastic.cli.table import print_sizes, size_rows

if TYPE_CHECKING:
    from star_elastic.adopt import Published
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.layout import Layout
    from star_elastic.submodel import Fields

_T = TypeVar("_T")


def adopt(
    checkpoint: Annotated[str, typer.Argument(help="a folder, or a hub id, NAME or NAME@REVISION")],
    size: Annotated[
        list[str] | None,
        typer.Option(help="a size: 12b:hidden_size=1920,moe_intermediate_size=960"),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="a size between two others: 23b:params=23.6B, or 23b:active=2.8B"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder of hard links; else config.json is changed")
    ] = None,
    layer_order: Annotated[
        Path | None, typer.Option(help="JSON, a list of layers, best first: depth is an axis then")
    ] = None,
    align: Annotated[
        str | None, typer.Option(help="widths in multiples: 64, or nvfp4, mxfp4, gguf")
    ] = None,
    digests: Annotated[
        bool, typer.Option("--digests/--no-digests", help="read the weights for their SHA-256")
    ] = True,
    replace: Annotated[bool, typer.Option(help="declare anew what declares sizes already")] = False,
    json: Annotated[bool, typer.Option("--json", help="a list of objects, one a size")] = False,
) -> None:
    """Declare the sizes of a nested checkpoint made elsewhere, without copying its weights.

    NVIDIA's Nemotron-Labs-3-Elastic-30B-A3B is known by its name; of any other you say the sizes.
    """
    from star_elastic import adopt as adoption
    from star_elastic import card
    from star_elastic.align import Alignment
    from star_elastic.checkpoint import Checkpoint

    console = Console(stderr=True)
    said = _by_name([_size(text) for text in size or []], "--size")
    budgets = [_budget(text) for text in budget or []]
    alignment = Alignment.parse(align)
    order = None if layer_order is None else adoption.read_order(layer_order)
    adoption.refuse_early(checkpoint, out)
    opened = Checkpoint.open(checkpoint, check_digests=False)
    adoption.refuse(opened, out, replace)
    known = adoption.published(opened)
    sizes = _sizes(opened, known, said)
    steps = alignment.for_codes(opened.weights.values()).steps(opened.layout)
    between = _between(opened, sizes, budgets, steps)
    space = adoption.space_of(opened, sizes, between, order, steps)
    unread = adoption.unknown_digests(opened) if digests else 0
    with moving(console, "digests", unread) if unread else nullcontext() as progress:
        adopted = adoption.adopt(opened, space, out, replace, digests, progress)
    print_sizes(size_rows(adopted), json)
    console.print(f"{adopted.path}: {card.ADOPTED}", soft_wrap=True)
    for each in adopted.space.submodels:
        if warning := card.warning(each, adopted.space):
            console.print(f"[red]{each.name}: {warning}[/red]", soft_wrap=True)
    if known is not None and known.missing and not size and not budget:
        console.print(f"{known.name}: {known.missing}", soft_wrap=True)


def _sizes(
    opened: "Checkpoint", known: "Published | None", said: "Mapping[str, Fields]"
) -> "dict[str, Fields]":
    """The trained sizes: published ones and those said, the whole parent among them."""
    sizes = {**(known.sizes if known else {}), **said}
    if not sizes:
        raise ValueError(_nothing_known(opened))
    whole = [name for name, fields in sizes.items() if not _smaller(opened.layout, fields)]
    return sizes if whole else {"full": {}, **sizes}


def _nothing_known(opened: "Checkpoint") -> str:
    from star_elastic.adopt import PUBLISHED, name_of

    text = f"{name_of(opened)}: no sizes are known of it: say --size NAME:field=value,..."
    for each in PUBLISHED:
        if each.config.items() <= opened.layout.sizes.items():
            text += f" (known are those of {each.name}, by its name: others have the same config)"
    return text


def _size(text: str) -> "tuple[str, Fields]":
    from star_elastic.budget import parse_field

    name, _, rest = text.partition(":")
    pairs = [parse_field(each, f"--size {name}:") for each in rest.split(",") if rest]
    return name, _by_name(pairs, f"--size {name}:")


def _budget(text: str) -> "tuple[str, Literal['params', 'active'], int]":
    from star_elastic.budget import parse_count

    name, _, rest = text.partition(":")
    kind, _, amount = rest.partition("=")
    if kind not in ("params", "active"):
        raise ValueError(f"--budget {text}: not of the form NAME:params=23.6B or NAME:active=2.8B")
    return name, kind, parse_count(amount, f"--budget {name}:{kind}")


def _by_name(pairs: Sequence[tuple[str, _T]], flag: str) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{flag} {name}: said twice")
        found[name] = value
    return found


def _smaller(layout: "Layout", fields: "Fields") -> bool:
    return any(layout.sizes.get(field) != value for field, value in fields.items())


def _between(
    opened: "Checkpoint",
    sizes: "Mapping[str, Fields]",
    budgets: "Sequence[tuple[str, Literal['params', 'active'], int]]",
    steps: Mapping[str, int],
) -> "dict[str, Fields]":
    """The largest size within each budget, on the line between the two that enclose it."""
    from star_elastic.between import interpolate
    from star_elastic.budget import Metric

    found: dict[str, Fields] = {}
    for name, kind, budget in budgets:
        if name in sizes or name in found:
            raise ValueError(f"--budget {name}: there is a size of this name")
        fields = interpolate(opened.layout, sizes, Metric(kind=kind), budget, steps)
        same = [other for other, each in sizes.items() if dict(each) == fields]
        if same:
            raise ValueError(f"--budget {name}: that is the size {same[0]}")
        found[name] = fields
    return found
