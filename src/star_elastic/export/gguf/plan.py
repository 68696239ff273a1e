"""All that is known of a GGUF file before its first byte is written; what cannot be is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
)
from gguf.utility import size_label

from star_elastic import configs
from star_elastic.card import licence_of
from star_elastic.checkpoint import Checkpoint
from star_elastic.export.gguf import llama, nvfp4
from star_elastic.export.gguf.architecture import architecture_of, hyperparameters
from star_elastic.export.gguf.tensors import Array, Entry, entries, extras
from star_elastic.export.gguf.tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from star_elastic.export.gguf.types import Type, check_widths
from star_elastic.folder import CheckpointError
from star_elastic.shapes import Sizes
from star_elastic.submodel import Submodel

_NUMBERS = np.dtype(np.float32)


@dataclass(frozen=True)
class Plan:
    """One size of a checkpoint as a file of one type."""

    checkpoint: Checkpoint
    size: Submodel
    kind: Type
    arch: MODEL_ARCH
    config: Any  # the size's, of the stock class
    sizes: Sizes
    entries: list[Entry]
    extras: Mapping[str, Array]
    vocabulary: Vocabulary
    coded: frozenset[str] = frozenset()  # the parent's matrices that are NVFP4 codes already

    def code(self, entry: Entry) -> GGMLQuantizationType:
        """The type of one tensor, as we write it; beside codes of the parent's, nothing is lost."""
        if entry.weight.name in self.coded:
            return GGMLQuantizationType.NVFP4
        if self.coded and entry.is_matrix:
            stored = self.checkpoint.stored[entry.weight.name].dtype
            return GGMLQuantizationType[stored]
        return self.kind.of(entry, self._has_experts)

    @property
    def bytes(self) -> int:
        """Bytes of tensors that we write."""
        return sum(nbytes(entry, self.code(entry)) for entry in self.entries)

    @cached_property
    def _has_experts(self) -> bool:
        return any(entry.is_stacked for entry in self.entries)


def make_plan(
    checkpoint: Checkpoint,
    size: Submodel,
    kind: Type,
    with_tokenizer: bool = True,
    fallback: bool = False,
) -> Plan:
    """Names, shapes and keys of a file.

    Args:
        fallback: let widths that do not fill blocks stand in another type.

    Raises:
        CheckpointError: a quantized parent, or a tokenizer that llama.cpp cannot express.
        ValueError: a size, or a width, that it cannot; llama.cpp's own codes, and it is missing.
    """
    layout = checkpoint.layout
    coded = nvfp4.coded_matrices(checkpoint)
    if coded and kind.name != "nvfp4":
        raise CheckpointError(
            f"{checkpoint.path}: {min(coded)}: its weights are quantized already: --type nvfp4 "
            f"takes the codes over; for {kind.name} export the checkpoint that was quantized"
        )
    config = configs.child_config(layout, size.config)
    try:
        arch = architecture_of(config)
        sizes = layout.sizes_of(size.config)
        several = entries(checkpoint, arch, config, sizes)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}/{error}") from None
    if coded:
        _check_codes(several, coded)
    elif not fallback:
        check_widths(checkpoint, size, kind)
    if not kind.is_direct:
        llama.require(kind)
    vocabulary = Vocabulary()
    if with_tokenizer:
        vocabulary = read_vocabulary(checkpoint.path, config.vocab_size)
    small = extras(several, config)
    return Plan(checkpoint, size, kind, arch, config, sizes, several, small, vocabulary, coded)


def _check_codes(several: list[Entry], coded: frozenset[str]) -> None:
    """Can llama.cpp have the parent's codes where they are?"""
    for entry in several:
        if entry.weight.name not in coded:
            continue
        if not entry.takes_nvfp4:
            raise ValueError(f"{entry.weight.name}: llama.cpp takes no NVFP4 codes there")
        if entry.shape[-1] % nvfp4.COLUMNS:
            raise ValueError(
                f"{entry.weight.name}: {entry.shape[-1]} columns of NVFP4 codes do not fill "
                f"llama.cpp's blocks of {nvfp4.COLUMNS}"
            )


def writer_of(plan: Plan) -> GGUFWriter:
    """A writer that knows all keys and all tensors' places, and has written nothing yet."""
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[plan.arch])
    for name, values in plan.extras.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for entry in plan.entries:
        code = plan.code(entry)
        # a dtype of uint8 would say that the shape counts bytes, not numbers
        writer.add_tensor_info(entry.name, entry.shape, _NUMBERS, nbytes(entry, code), code)
        if code == GGMLQuantizationType.NVFP4:
            name, count = entry.name.replace(".weight", ".scale"), len(entry.sources)
            writer.add_tensor_info(name, (count,), _NUMBERS, 4 * count)
    _describe(writer, plan)
    hyperparameters(writer, plan.arch, plan.config)
    write_vocabulary(writer, plan.vocabulary)
    return writer


def _describe(writer: GGUFWriter, plan: Plan) -> None:
    """What the file is: `general`, and under `star_elastic` which size of what."""
    size, source = plan.size, plan.checkpoint.path.resolve().name
    writer.add_type("model")
    writer.add_name(f"{source} {size.name}")
    writer.add_basename(source)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(plan.kind.file)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in licence_of(plan.checkpoint.path).items():
        writer.add_string(f"general.{key.replace('_', '.')}", value)
    writer.add_string("star_elastic.size", size.name)
    writer.add_string("star_elastic.config", json.dumps(size.config, sort_keys=True))
    writer.add_uint64("star_elastic.total_params", size.total_params)
    writer.add_uint64("star_elastic.active_params", size.active_params)
    writer.add_bool("star_elastic.trained", size.trained)


def nbytes(entry: Entry, code: GGMLQuantizationType) -> int:
    """Bytes of a tensor in a type."""
    block, held = GGML_QUANT_SIZES[code]
    return prod(entry.shape) // block * held
