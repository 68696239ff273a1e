"""Codes that llama.cpp alone can make, through llama-cpp-python."""

import ctypes
import importlib.util
import os
from pathlib import Path

from star_elastic.export.gguf.types import Type


def require(kind: Type) -> None:
    """Is llama.cpp there to make this type?

    Raises:
        ValueError: it is not; says what to install.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ValueError(
            f"--type {kind.name}: these codes are made by llama.cpp itself: "
            "pip install llama-cpp-python (it builds llama.cpp; about 8 minutes of one core), or "
            "take --type bf16 and quantize that file with llama.cpp's llama-quantize"
        )


def quantize(source: Path, target: Path, kind: Type) -> None:
    """Write `target` as `source` in another type, in as many threads as there are cores.

    Raises:
        ValueError: llama.cpp refuses; its reason goes to stderr.
    """
    import llama_cpp  # type: ignore[import-not-found]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(kind.file)
    llama_cpp.llama_backend_init()
    failed = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    if failed:
        raise ValueError(f"{target}: llama.cpp could not quantize to {kind.name} ({failed})")
