"""Fake quantization: a corner's numbers are those of the codes, its gradient the weights' own."""

from pathlib import Path

import pytest
import torch
from codes import NAMES, encoded, form_of
from safetensors.torch import load_file
from test_quantize import parent_of, quantized
from torch import Tensor

from star_elastic.precision import Format, INT8Groups
from star_elastic.precision.fake import fake, straight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [*(form_of(name) for name in NAMES), INT8Groups(8), INT8Groups(8, read=4)]
CUTS = {
    "whole": [],
    "columns": [(1, [(0, 16)])],
    "rows": [(0, [(0, 2), (5, 3)])],
    "corner": [(0, [(0, 2), (5, 3)]), (1, [(0, 16), (32, 16)])],
}


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    """Its largest magnitudes are where no size keeps them; a block is all zeros."""
    draw = torch.Generator().manual_seed(3)
    found = torch.randn(9, 64, generator=draw)
    found[4] *= 5  # a row that is cut off
    found[:, 63] = 30  # a column that is
    found[1, :16] = 0
    return found.to(dtype)


def meant(form: Format, weight: Tensor) -> Tensor:
    """The whole, encoded and decoded."""
    found = encoded(form, weight.float() if weight.dtype == torch.float16 else weight)
    return form.decode(found.pop(form.codes), found)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_corner_is_the_corner_of_the_whole(form: Format, dtype: torch.dtype, cut: str) -> None:
    weight, expected = matrix(dtype), meant(form, matrix(dtype))
    for dim, runs in CUTS[cut]:
        kept = [torch.arange(start, start + length) for start, length in runs]
        expected = expected.index_select(dim, torch.cat(kept))
    found = fake(weight, form, CUTS[cut])
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(weight, matrix(dtype))  # it stays as it is
    alone = meant(form, torch.ones_like(weight)[:2, :16])
    assert alone.shape == (2, 16)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_scales_are_the_wholes(form: Format) -> None:
    """A corner quantized by itself would be another where its scales reach beyond it."""
    corner = fake(matrix(), form, CUTS["columns"])
    alone = fake(matrix()[:, :16].contiguous(), form)
    reaches = form.has_whole or form.block == 1
    assert torch.equal(corner, alone) != reaches


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_the_file_says(name: str, tmp_path: Path) -> None:
    """Every matrix of a written checkpoint, decoded."""
    plain, form = parent_of("qwen3_moe", tmp_path / "plain"), form_of(name)
    quantized(plain, tmp_path / "coded", name)
    stored, seen = load_file(tmp_path / "coded/model.safetensors"), 0
    for weight, tensor in plain.tensors():
        module = weight.rpartition(".")[0]
        scales = {
            leaf: stored.get(f"{module}.{leaf}") for leaf in ("weight_scale", "weight_scale_2")
        }
        if scales["weight_scale"] is not None:
            known = {leaf: scale for leaf, scale in scales.items() if scale is not None}
            expected = form.decode(stored[f"{module}.{form.codes}"], known)
            assert torch.equal(fake(tensor, form), expected), weight
            seen += 1
    assert seen == 3 * 4 + 3 + 2 * 6 * 3


def test_the_gradient_goes_straight_through() -> None:
    """Also where values were clamped, and in the dtype of the weight."""
    weight = matrix(torch.bfloat16).requires_grad_(True)
    value = fake(weight, form_of("nvfp4"))
    found = straight(weight, value)
    assert torch.equal(found, value) and not torch.equal(found, weight.float())
    outer = torch.randn(found.shape)
    (found * outer).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, outer.to(torch.bfloat16))
