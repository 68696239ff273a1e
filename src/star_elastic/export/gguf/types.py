"""Types of a GGUF file: who makes their codes, and what widths these need.

Codes stand in blocks along a matrix's input: 32 of them, 256 for K-quants. Where a width does not
fill blocks, llama.cpp takes another type and says so in a log only; here it is refused, unless that
is what was asked for.
"""

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, GGMLQuantizationType, LlamaFileType

from star_elastic.align import Alignment
from star_elastic.checkpoint import Checkpoint
from star_elastic.export.gguf.tensors import Entry
from star_elastic.layout import Layout, Weight
from star_elastic.submodel import Fields, Submodel, check_fields
from star_elastic.symbols import symbol_of

Code = GGMLQuantizationType
_DIRECT = {
    "f32": (LlamaFileType.ALL_F32, Code.F32),
    "f16": (LlamaFileType.MOSTLY_F16, Code.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, Code.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, Code.Q8_0),
    "mxfp4": (LlamaFileType.MOSTLY_MXFP4_MOE, Code.MXFP4),
    "nvfp4": (LlamaFileType.MOSTLY_NVFP4, Code.NVFP4),
}
# What llama.cpp itself makes; the types of fewer bits want to see activations first.
_BY_LLAMA = {
    "q2_k": Code.Q2_K,
    "q3_k_s": Code.Q3_K,
    "q3_k_m": Code.Q3_K,
    "q3_k_l": Code.Q3_K,
    "q4_0": Code.Q4_0,
    "q4_1": Code.Q4_1,
    "q4_k_s": Code.Q4_K,
    "q4_k_m": Code.Q4_K,
    "q5_0": Code.Q5_0,
    "q5_1": Code.Q5_1,
    "q5_k_s": Code.Q5_K,
    "q5_k_m": Code.Q5_K,
    "q6_k": Code.Q6_K,
    "iq4_nl": Code.IQ4_NL,
    "iq4_xs": Code.IQ4_XS,
}
_ENDS = {MODEL_TENSOR.TOKEN_EMBD, MODEL_TENSOR.OUTPUT}


@dataclass(frozen=True)
class Type:
    """What `--type` names: a kind of file, and the code of most of its matrices."""

    name: str
    file: LlamaFileType
    code: Code
    is_direct: bool

    @property
    def block(self) -> int:
        """Elements under one scale, along the input of every matrix."""
        return GGML_QUANT_SIZES[self.code][0]

    def of(self, entry: Entry, has_experts: bool) -> Code:
        """The code of a tensor that we write ourselves.

        MXFP4 is for experts, or for all blocks where there are none, as in llama.cpp; NVFP4 where
        llama.cpp multiplies by a matrix's scale. The rest of such a file is Q8_0. A width that does
        not fill blocks stays F16.
        """
        if not entry.is_matrix:
            return Code.F32
        code = self.code
        if self.code == Code.MXFP4 and not (
            entry.is_stacked if has_experts else entry.kind not in _ENDS
        ):
            code = Code.Q8_0
        if self.code == Code.NVFP4 and not entry.takes_nvfp4:
            code = Code.Q8_0
        return Code.F16 if entry.shape[-1] % GGML_QUANT_SIZES[code][0] else code


def type_of(text: str) -> Type:
    """The type that a name tells, in any case: `q4_k_m`.

    Raises:
        ValueError: none that we can make; lists those there are.
    """
    name = text.lower()
    if name in _DIRECT:
        return Type(name, *_DIRECT[name], is_direct=True)
    if name in _BY_LLAMA:
        return Type(name, LlamaFileType[f"MOSTLY_{name.upper()}"], _BY_LLAMA[name], False)
    known = ", ".join([*_DIRECT, *_BY_LLAMA])
    raise ValueError(f"--type {text[:40]}: not one of {known}")


def check_widths(checkpoint: Checkpoint, size: Submodel, kind: Type) -> None:
    """Does every matrix's input fill blocks?

    Raises:
        ValueError: naming tensor, field and value, and the nearest size that would do.
    """
    layout = checkpoint.layout
    for weight, axis, width in _misfits(layout, size.config, kind.block):
        value = layout.sizes_of(size.config).get(axis)
        raise ValueError(
            f"--type {kind.name}: {axis} = {value}: the input of {weight.name}, {width}, is no "
            f"multiple of {kind.block}, and llama.cpp would take another type there (--fallback "
            f"lets it). {_offers(checkpoint, size.config, kind)}"
        )


def _offers(checkpoint: Checkpoint, fields: Fields, kind: Type) -> str:
    """What would do instead."""
    layout, block = checkpoint.layout, kind.block
    named = [s.name for s in checkpoint.space.submodels if not _misfits(layout, s.config, block)]
    near = " ".join(f"--set {axis}={n}" for axis, n in _nearest(layout, fields, block).items())
    offers = [f"Sizes that fit: {', '.join(named)}"] if named else []
    offers += [f"the nearest that fits: {near}"] if near else []
    offers += ["--type q8_0 wants multiples of 32 only"] if block > 32 else []
    return "; ".join(offers) or "No size of this parent fits"


def _misfits(layout: Layout, fields: Fields, block: int) -> list[tuple[Weight, str, int]]:
    """The matrices whose input does not fill blocks, and an axis that makes it what it is."""
    child, found = layout.sizes_of(fields), {}
    for _, weight in layout.kept(child):
        if len(weight.dims) == 2 and (width := weight.shape(child)[-1]) % block:
            symbols = {symbol for segment in weight.dims[-1] for symbol in segment}
            axes = [axis for axis in layout.axes if symbol_of(layout.family, axis) in symbols]
            axis = next((a for a in axes if a in fields), axes[0] if axes else min(symbols))
            found.setdefault(weight.suffix, (weight, axis, width))
    return list(found.values())


def _nearest(layout: Layout, fields: Fields, block: int) -> dict[str, int]:
    """A size like this one whose inputs fill blocks; nothing if the parent holds none."""
    steps, found = Alignment(block).steps(layout), {**fields}
    for _, axis, _ in _misfits(layout, fields, block):
        step = steps[axis] if axis in steps else layout.sizes[axis] + 1  # no axis: none will do
        choices = range(step, layout.sizes[axis] + 1, step)
        if not choices:
            return {}
        value = layout.sizes_of(found)[axis]
        found[axis] = min(choices, key=lambda n: abs(n - value))
    try:
        check_fields(layout, found)
    except ValueError:
        return {}
    whole = {name: value for name, value in found.items() if isinstance(value, int)}
    return {} if _misfits(layout, found, block) else whole
