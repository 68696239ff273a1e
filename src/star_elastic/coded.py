"""A quantized parent in memory: codes and scales stay as they are on disk, for every size at once.

A size is cut from codes as it is cut from numbers, by `Weight.cuts`, into views; `Coded.fill`
builds them into a stock model.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from star_elastic import stock, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.layout import Layout, Weight
from star_elastic.packed import SCALARS, SHAPE
from star_elastic.precision import CodedExperts, CodedLinear, CodedMatrix
from star_elastic.shapes import Sizes, narrow
from star_elastic.submodel import Fields

_NOT_NEEDED = {SHAPE, *SCALARS}  # numbers are made of codes, and activations stay numbers
Kept = tuple[str, Weight, Tensor]  # a submodel's own name, the parent's weight, the part kept


@dataclass(frozen=True)
class Coded:
    """A parent's tensors, and what each is, by in-memory names.

    Where a matrix of a fused tensor stands as codes, all its matrices have names of their own:
    `...experts.3.up_proj.weight` and `weight_scale`. Codes are read at `bits`, if that is said.
    """

    layout: Layout
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Weight]
    bits: int | None = None

    def fill(self, model: PreTrainedModel, fields: Fields) -> None:
        """Give a stock model of a size, built on `meta`, its tensors; its matrices stay codes.

        Raises:
            ValueError: codes that are not run, or not at so few bits.
        """
        child = self.layout.sizes_of(fields)
        kept = [
            (name, weight, narrow(self.tensors[weight.name], weight.cuts(self.layout.sizes, child)))
            for name, weight in self.layout.kept(child, self.weights)
        ]
        _place(model, kept, child, self.bits)


def load(
    opened: Checkpoint,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> tuple[PreTrainedModel, Coded]:
    """A quantized checkpoint as a stock model whose matrices are codes, and its tensors.

    Args:
        dtype: of the computation, and of what is no codes; `auto`: as the config says.

    Raises:
        CheckpointError: a file that cannot be read.
        ValueError: a tensor that is missing, codes that are not run.
    """
    config = copy.deepcopy(opened.config)
    # stock code would take the model for one of another library
    vars(config).pop("quantization_config", None)
    if dtype != "auto":
        config.dtype = dtype
    model = stock.build(config, device="meta").eval()
    held = Coded(opened.layout, *_read(opened, model, device))
    held.fill(model, {})
    with torch.device(device or "cpu"):
        stock.fill_constants(model)
    model.tie_weights()
    stock.refuse_meta(model)
    if (opened.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(opened.path)
    return model, held


def _read(
    opened: Checkpoint, like: PreTrainedModel, device: str | None
) -> tuple[dict[str, Tensor], dict[str, Weight]]:
    """Numbers take the dtypes that a stock model would give them; codes and scales stay."""
    layout, weights = opened.layout, _weights(opened)
    plain = [weight for name, weight in weights.items() if weight is layout.weights.get(name)]
    found = {
        name: tensor.to(device, stock.loaded_dtype(like, name))
        for name, tensor in tensors.in_memory(opened, plain)
    }
    coded = [name for name in opened.weights if layout.in_memory(name) in weights.keys() - found]
    for name, tensor in zip(coded, opened.read(coded), strict=True):
        found[layout.in_memory(name)] = tensor.to(device)
    return found, weights


def _place(model: PreTrainedModel, kept: Iterable[Kept], child: Sizes, bits: int | None) -> None:
    expected = stock.get_tensors(model)
    plain: dict[str, Tensor] = {}
    matrices: dict[str, list[Kept]] = defaultdict(list)
    for name, weight, tensor in kept:
        if name in expected and not _is_coded(tensor, expected[name]):
            plain[name] = tensor
        else:
            matrices[name.rpartition(".")[0]].append((name, weight, tensor))
    stock.set_tensors(model, plain)
    experts: dict[str, dict[int, dict[int, CodedMatrix]]] = defaultdict(lambda: defaultdict(dict))
    for module, several in matrices.items():
        matrix, weight = _matrix(module, several, child, bits), several[0][1]
        if weight.expert is None:
            _replace_linear(model, module, matrix)
        else:
            fused, part = weight.place
            owner = module.rpartition(f".{weight.expert}.")[0]
            experts[f"{owner}.{fused.rpartition('.')[2]}"][weight.expert][part] = matrix
    for name, found in experts.items():
        _replace_experts(model, name, found)
    if experts:
        model.set_experts_implementation("eager")  # the one that asks for an expert at a time


def _weights(opened: Checkpoint) -> dict[str, Weight]:
    """What is held in memory: plain tensors as the stock class fuses them, others as on disk."""
    layout = opened.layout
    plain = {
        name: layout.weights[name]
        for name, pieces in layout.pieces.items()
        if all(opened.weights.get(piece.name) is piece for piece in pieces)
    }
    apart = {
        layout.in_memory(name): replace(weight, name=layout.in_memory(name))
        for name, weight in opened.weights.items()
        if weight.place[0] not in plain and name.rpartition(".")[2] not in _NOT_NEEDED
    }
    return plain | apart


def _is_coded(tensor: Tensor, expected: Tensor) -> bool:
    """Codes of eight bits have the name of the numbers they stand for."""
    return tensor.dtype.itemsize == 1 and expected.dtype.itemsize > 1


def _matrix(module: str, several: list[Kept], child: Sizes, bits: int | None) -> CodedMatrix:
    found = {name.rpartition(".")[2]: tensor for name, _, tensor in several}
    codes = next(weight for name, weight, _ in several if name.endswith(("weight", "_packed")))
    columns = codes.shape(child)[1] * (codes.blocks or (1, 1))[1]
    try:
        return CodedMatrix(found, columns, bits)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None


def _replace_linear(model: PreTrainedModel, name: str, matrix: CodedMatrix) -> None:
    owner, _, leaf = name.rpartition(".")
    linear = model.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name}: a {type(linear).__name__} does not work on codes")
    dtype = linear.weight.dtype
    setattr(model.get_submodule(owner), leaf, CodedLinear(matrix, linear.bias, dtype))


def _replace_experts(
    model: PreTrainedModel, name: str, found: Mapping[int, Mapping[int, CodedMatrix]]
) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    dtype: torch.dtype = getattr(module, leaf).dtype
    ordered = [[parts[part] for part in sorted(parts)] for _, parts in sorted(found.items())]
    delattr(module, leaf)
    setattr(module, leaf, CodedExperts(ordered, dtype))
