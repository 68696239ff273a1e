"""`rings.json`: what a packed folder holds, which size needs which file, and what each must be.

Nobody vouches for it: its paths are `FOLDER/FILE` and nothing else, and every file that it names is
held against its digest before it is used (docs/rings.md).
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from star_elastic.folder import INDEX, CheckpointError, one_line, parse_json
from star_elastic.submodel import Strict

MANIFEST = "rings.json"
MAX_MANIFEST = 4 * 2**20  # bytes; a shard of 5 GB takes a line of 150
VERSION = 1
CORE, PARENT = "core", "parent"

_FILE = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(_FILE + r"\Z")
Name = Annotated[str, Field(pattern=f"^{_FILE}$")]
Relative = Annotated[str, Field(pattern=f"^{_FILE}/{_FILE}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=0, lt=2**48)]


class Held(Strict):
    """What a file must be."""

    bytes: Bytes
    sha256: Digest


class Original(Held):
    """A weight file of the parent's folder: what it is once rebuilt, and where its header is."""

    header: Relative


class Ring(Strict):
    """A size of the chain: its fields, what it adds to the one before, what stands beside it.

    `weights` are the files of the core, or of the ring, in `folder`. `beside` are all other files
    of the ordinary folder of this size, by their names there, and where their bytes are.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    config: dict[str, int]
    total_params: int = Field(ge=0)
    active_params: int = Field(ge=0)
    folder: Name
    weights: list[Relative] = Field(min_length=1)
    beside: dict[Name, Relative]

    @model_validator(mode="after")
    def _check(self) -> "Ring":
        if any(not path.startswith(f"{self.folder}/") for path in self.weights):
            raise ValueError(f"weights: not all in {self.folder}")
        if "config.json" not in self.beside:
            raise ValueError("beside: no config.json")
        return self


class Manifest(Strict):
    """The whole of `rings.json`: a chain of sizes, the smallest first, the parent last."""

    format_version: Literal[1] = VERSION
    sizes: list[Ring] = Field(min_length=2)
    parent: dict[Name, Original] = Field(min_length=1)
    files: dict[Relative, Held]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        for what in ("name", "folder"):
            if len({getattr(size, what) for size in self.sizes}) < len(self.sizes):
                raise ValueError(f"sizes: two have the same {what}")
        for path in sorted(self._named() ^ self.files.keys()):
            what = "belongs to no size" if path in self.files else "is missing"
            raise ValueError(f"files: {path} {what}")
        if both := self.parent.keys() & self.sizes[-1].beside.keys():
            raise ValueError(f"parent: {min(both)} is also beside the weights")
        for size in self.sizes[:-1]:
            if weights := [n for n in size.beside if n.endswith(".safetensors") or n == INDEX]:
                raise ValueError(f"sizes.{size.name}.beside: {weights[0]} is no such file")
        if len({path.lower() for path in self.files}) < len(self.files):
            raise ValueError("files: two differ in case only")
        return self

    def number(self, size: str) -> int:
        """Where in the chain a named size stands.

        Raises:
            ValueError: no such size; lists those there are.
        """
        names = [each.name for each in self.sizes]
        if size not in names:
            raise ValueError(f"no size {size!r}; there are {', '.join(names)}")
        return names.index(size)

    def needed(self, number: int) -> list[str]:
        """The files that a size is made of: smaller sizes' weights, its own, what stands beside.

        What the parent is (its config and headers) is needed by all but the smallest size.
        """
        paths = [path for size in self.sizes[: number + 1] for path in size.weights]
        paths += self.sizes[number].beside.values()
        if number:
            parent = self.sizes[-1].beside
            paths += [path for file, path in parent.items() if file in _TOLD]
            paths += [original.header for original in self.parent.values()]
        return list(dict.fromkeys(paths))

    def bytes(self, paths: Iterable[str]) -> int:
        """How many bytes some files have."""
        return sum(self.files[path].bytes for path in paths)

    def _named(self) -> set[str]:
        paths = {path for size in self.sizes for path in (*size.weights, *size.beside.values())}
        return paths | {original.header for original in self.parent.values()}


_TOLD = ("config.json", "hf_quant_config.json")  # files that tell what the parent is


def read_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in the bytes of a `rings.json`.

    Args:
        where: its name in errors.

    Raises:
        CheckpointError: one line naming the field.
    """
    try:
        values = parse_json(data)
        if values.get("format_version") != VERSION:
            shown = str(values.get("format_version"))[:40]
            raise ValueError(f"format_version: unknown version {shown!r}")
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part)[:80] for part in first["loc"])
        raise CheckpointError(f"{where}: {field + ': ' if field else ''}{first['msg']}") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: {one_line(error)}") from None


def manifest_bytes(manifest: Manifest) -> bytes:
    """The text of a `rings.json`."""
    values: dict[str, Any] = manifest.model_dump()
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def check_name(folder: Path, name: str) -> str:
    """The name itself, if a manifest can hold it.

    Raises:
        ValueError: it has other letters than `A-Za-z0-9._-`, or begins with a dot.
    """
    if not _NAME.match(name):
        raise ValueError(f"{folder / name}: rings cannot hold a file of this name; rename it")
    return name
