"""Names and sizes of number formats: as configs write them, as safetensors headers write them."""

from typing import Any

# safetensors name -> (config name, bytes)
_FORMATS = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
STORED = {stored: name for stored, (name, _) in _FORMATS.items()}  # "BF16" -> "bfloat16"
STORED_AS = {name: stored for stored, name in STORED.items()}  # "bfloat16" -> "BF16"
STORED_ITEMSIZE = {stored: size for stored, (_, size) in _FORMATS.items()}  # "BF16" -> 2
ITEMSIZE = dict(_FORMATS.values())  # "bfloat16" -> 2


def dtype_of(config: Any) -> str:
    """The name of a config's dtype; float32 where it has none."""
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
