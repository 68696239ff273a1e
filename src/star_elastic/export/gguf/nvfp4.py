"""NVFP4 as llama.cpp has it: 64 columns a block, their E4M3 scales in front, one scale a matrix.

Codes and scales are those that `quantize` writes (ModelOpt's layout), bit for bit; the scale of a
matrix stands in a tensor of its own, `NAME.scale`, one value an expert.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import MODEL_TENSOR
from torch import Tensor

from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError
from star_elastic.precision import NVFP4

COLUMNS = 64  # in one of llama.cpp's blocks
_UNDER_A_SCALE = 16
# the matrices whose product llama.cpp multiplies by a scale
SCALED = {
    MODEL_TENSOR.ATTN_Q,
    MODEL_TENSOR.ATTN_K,
    MODEL_TENSOR.ATTN_V,
    MODEL_TENSOR.ATTN_OUT,
    MODEL_TENSOR.FFN_GATE,
    MODEL_TENSOR.FFN_UP,
    MODEL_TENSOR.FFN_DOWN,
    MODEL_TENSOR.FFN_UP_SHEXP,
    MODEL_TENSOR.FFN_DOWN_SHEXP,
    MODEL_TENSOR.FFN_GATE_EXP,
    MODEL_TENSOR.FFN_UP_EXP,
    MODEL_TENSOR.FFN_DOWN_EXP,
    MODEL_TENSOR.SSM_IN,
    MODEL_TENSOR.SSM_OUT,
}


@dataclass(frozen=True)
class Codes:
    """A matrix in codes: (rows, columns / 2) with two in a byte, the first in the low half;
    bits of E4M3 scales (rows, columns / 16); a scale of the whole."""

    packed: np.ndarray
    scales: np.ndarray
    whole: float


def coded_matrices(checkpoint: Checkpoint) -> frozenset[str]:
    """The matrices of a parent that stand there as NVFP4 codes, by their names on disk.

    Raises:
        CheckpointError: there are other codes; names file and tensor.
    """
    plain, weights = checkpoint.layout.stored, checkpoint.weights
    found = {name for name, weight in plain.items() if weights.get(name) is not weight}
    for name in sorted(found):
        scale = weights.get(f"{name}_scale")
        blocks = scale.blocks if f"{name}_scale_2" in weights and scale is not None else ()
        if blocks != (1, _UNDER_A_SCALE):
            file = next(s.file for n, s in checkpoint.stored.items() if n.startswith(name))
            raise CheckpointError(
                f"{checkpoint.path / file}: {name}: quantized, and not to NVFP4 in ModelOpt's "
                "layout; export the checkpoint that was quantized, with --type"
            )
    stacks = {name: (w.layer, w.suffix) for name, w in plain.items() if w.expert is not None}
    partly = {stacks[n] for n in stacks if n in found} & {
        stacks[n] for n in stacks if n not in found
    }
    if name := min((n for n in found if stacks.get(n) in partly), default=None):
        raise CheckpointError(
            f"{checkpoint.path}: {name}: only some of its layer's experts are codes"
        )
    return frozenset(found)


def read(packed: Tensor, scales: Tensor, whole: Tensor) -> Codes:
    """Codes as they stand on disk."""
    return Codes(packed.numpy(), scales.contiguous().view(torch.uint8).numpy(), float(whole))


def encoded(values: np.ndarray) -> Codes:
    """The codes of numbers, as `quantize` makes them; (rows, columns)."""
    form, weight = NVFP4(), torch.from_numpy(np.ascontiguousarray(values))
    whole = form.whole(weight.abs().max())
    scales = {**whole, **form.rows(weight, whole)}
    return read(form.encode(weight, scales), scales["weight_scale"], scales["weight_scale_2"])


def blocks(codes: Codes) -> np.ndarray:
    """(rows, columns / 64 * 36) bytes: four scales, then 32 bytes of codes.

    Of 16 columns under one scale, the first eight are in the low halves of eight bytes.
    """
    rows, half = codes.packed.shape
    pairs = codes.packed.reshape(rows, half // 8, 8)
    nibbles = np.stack([pairs & 15, pairs >> 4], -1).reshape(rows, half // 8, _UNDER_A_SCALE)
    turned = nibbles[..., :8] | nibbles[..., 8:] << 4
    scales = codes.scales.reshape(rows, -1, 4) & 0x7F  # llama.cpp's have no sign
    whole = np.concatenate([scales, turned.reshape(rows, -1, 32)], -1)
    return whole.reshape(rows, -1)
