"""Matrices that stay codes in memory, and the modules that work with them.

Numbers exist for the rows at work only. Codes and scales may be views of a larger model's.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_elastic.precision.floats import FP8, NVFP4
from star_elastic.precision.format import Format
from star_elastic.precision.integers import INT4, INT8, INT8Groups

AT_ONCE = 2**22  # numbers that are decoded at once: 16 MiB in float32
FEW = 16  # tokens up to which torch's kernel for INT8 beats decoding, on a CPU


class CodedMatrix(nn.Module):
    """One matrix, as the tensors that stand for it: `codes`, and scales by their names on disk."""

    def __init__(self, found: Mapping[str, Tensor], columns: int, bits: int | None = None):
        """From tensors by the name that follows the module's; numbers may stand for themselves.

        Args:
            bits: read codes as if there were no more; None: all that there are.

        Raises:
            ValueError: codes that are not run, or not at so few bits.
        """
        super().__init__()
        self.form = format_in(found, columns, bits)
        codes = found["weight" if self.form is None else self.form.codes]
        self.shape = (len(codes), columns)
        self.register_buffer("codes", codes)
        self._per_row = []
        for leaf, scale in found.items():
            if scale is not codes:
                scale = scale[:, None] if scale.shape == (len(codes),) and len(codes) > 1 else scale
                self.register_buffer(leaf, scale)
                if scale.dim() == 2 and len(scale) == len(codes):
                    self._per_row.append(leaf)

    def rows(self, some: slice) -> Tensor:
        """Some rows in numbers, float32 where they are decoded."""
        codes = self.get_buffer("codes")[some]
        if self.form is None:
            return codes
        scales = dict(self.named_buffers())
        scales |= {leaf: scales[leaf][some] for leaf in self._per_row}
        return self.form.decode(codes, scales)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in numbers, so many at once: which they are, and they."""
        step = max(1, AT_ONCE // self.shape[1])
        for start in range(0, self.shape[0], step):
            some = slice(start, min(start + step, self.shape[0]))
            yield some, self.rows(some)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The matrix in numbers."""
        return torch.cat([rows.to(dtype) for _, rows in self.parts()])


class CodedLinear(nn.Module):
    """`nn.Linear` whose weight is codes."""

    def __init__(self, matrix: CodedMatrix, bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__()
        self.matrix = matrix
        self.bias = bias
        self.dtype = dtype
        self.out_features, self.in_features = matrix.shape

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of `hidden`."""
        if self._has_kernel(hidden):
            return self._by_kernel(hidden)
        parts = [
            F.linear(hidden, rows.to(hidden.dtype), None if self.bias is None else self.bias[some])
            for some, rows in self.matrix.parts()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @property
    def weight(self) -> Tensor:
        """The whole matrix in numbers, made anew: for kernels that ask for it."""
        return self.matrix.whole(self.dtype)

    def _has_kernel(self, hidden: Tensor) -> bool:
        """INT8 rows on a CPU in bfloat16, where decoding would outweigh the product."""
        is_int8 = isinstance(self.matrix.form, INT8) and hidden.device.type == "cpu"
        few = hidden.numel() <= FEW * self.in_features
        return is_int8 and few and hidden.dtype == torch.bfloat16

    def _by_kernel(self, hidden: Tensor) -> Tensor:
        tensors = dict(self.matrix.named_buffers())
        codes, scale = tensors["codes"], tensors["weight_scale"]
        flat = hidden.reshape(-1, self.in_features)
        scale = scale.to(hidden.dtype).reshape(-1).expand(self.out_features)
        product = torch._weight_int8pack_mm(flat, codes.contiguous(), scale.contiguous())
        product = product.view(*hidden.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


class CodedExperts(nn.Module):
    """Stands for a fused parameter of experts (experts, out, in): indexing decodes one of them."""

    def __init__(self, experts: list[list[CodedMatrix]], dtype: torch.dtype):
        """Of each expert the matrices that are fused, one above the other."""
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(matrices) for matrices in experts)
        self.dtype = dtype

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """The matrix of one expert, (out, in)."""
        matrices = cast(Iterable[CodedMatrix], self.experts[int(expert)])
        return torch.cat([matrix.whole(self.dtype) for matrix in matrices])


def format_in(found: Mapping[str, Tensor], columns: int, bits: int | None = None) -> Format | None:
    """The format of some tensors, by the name that follows the module's; None: plain numbers.

    Raises:
        ValueError: codes that are not run, or not at so few bits.
    """
    form = _format_in(found, columns, bits)
    whole = getattr(form, "bits", 4 if isinstance(form, NVFP4) else 8)
    if form is not None and bits not in (None, whole) and not isinstance(form, INT8Groups):
        raise ValueError(f"bits {bits}: {form.name} is not read at fewer than its own {whole}")
    return form


def _format_in(found: Mapping[str, Tensor], columns: int, bits: int | None) -> Format | None:
    dtypes = {leaf: tensor.dtype for leaf, tensor in found.items()}
    scale = found.get("weight_scale")
    if dtypes.keys() == {"weight"} and found["weight"].dtype.itemsize > 1:
        return None
    known = {"weight", "weight_packed", "weight_scale", "weight_scale_2"}
    if scale is None or not found.keys() <= known:
        raise ValueError(f"no numbers are made of codes beside {', '.join(sorted(found))}")
    in_blocks = scale.dim() == 2 and scale.shape[1] > 1
    match dtypes.get("weight", dtypes.get("weight_packed")):
        case torch.float8_e4m3fn if not in_blocks:
            return FP8()
        case torch.int8 if not in_blocks:
            return INT8()
        case torch.uint8 if "weight_scale_2" in found:
            return NVFP4(columns // scale.shape[1])
        case torch.int32 if scale.dim() == 2:
            each = columns // found["weight_packed"].shape[1]
            group = columns // scale.shape[1]
            return INT4(group) if each == 8 else INT8Groups(group, bits or 8)
    told = ", ".join(f"{leaf} {dtype}" for leaf, dtype in sorted(dtypes.items()))
    raise ValueError(f"no numbers are made of {told}")
