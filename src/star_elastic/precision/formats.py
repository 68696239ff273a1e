"""The number formats by name. Codes and scales are bit for bit those of compressed-tensors 0.20.

Its arithmetic is done here in the same order and in the matrix's own dtype (float16 in float32: its
reciprocals overflow).
"""

from star_elastic.precision.floats import FP8, NVFP4
from star_elastic.precision.format import Format
from star_elastic.precision.integers import INT4, INT8, INT8Groups

FORMATS: tuple[type[Format], ...] = (FP8, NVFP4, INT8, INT4)


def format_of(name: str, group: int | None = None) -> Format:
    """A format by its name; `group` is how many columns share a scale of INT4, or of INT8.

    Without it INT4 has groups of 128, and INT8 a scale a row.

    Raises:
        ValueError: no such format, or a group that it cannot have.
    """
    kinds = {each.name: each for each in FORMATS}
    if name not in kinds:
        raise ValueError(f"--format {name}: not one of {', '.join(kinds)}")
    if group is None:
        return kinds[name]()
    grouped: dict[str, type[Format]] = {INT4.name: INT4, INT8.name: INT8Groups}
    if name not in grouped:
        raise ValueError(f"--group {group}: only int4 and int8 have groups of a chosen size")
    return grouped[name](group)
