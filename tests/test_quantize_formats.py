"""Codes and scales against compressed-tensors on the same matrices, and how far off they are."""

import pytest
import torch
from codes import NAMES, encoded, form_of, raw
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from star_elastic.precision import Format, format_of


def library(name: str, form: Format, weight: Tensor) -> dict[str, Tensor]:
    """Codes and scales that compressed-tensors makes of a matrix."""
    args = {
        "fp8": QuantizationArgs(num_bits=8, type="float", strategy="tensor"),
        "int8": QuantizationArgs(num_bits=8, type="int", strategy="channel"),
        "int4": QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=form.block),
        "int8_groups": QuantizationArgs(
            num_bits=8, type="int", strategy="group", group_size=form.block
        ),
        "nvfp4": QuantizationArgs(
            num_bits=4,
            type="float",
            strategy="tensor_group",
            group_size=16,
            scale_dtype=torch.float8_e4m3fn,
            zp_dtype=torch.float8_e4m3fn,
        ),
    }[name]
    layouts = {"fp8": "float", "int8": "int", "nvfp4": "nvfp4-pack"}
    layout = layouts.get(name, "pack")
    blocks = weight.unflatten(1, (-1, form.block)) if form.block > 1 else weight
    dims = {"fp8": (0, 1)}.get(name, -1)
    low, high = blocks.amin(dims), blocks.amax(dims)
    state = {"weight": weight}
    if name == "nvfp4":
        state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
    found = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    if name == "int8_groups":  # whose scales are sought for the sake of four bits
        found = (encoded(form, weight)["weight_scale"], found[1])
    for leaf, value in zip(("weight_scale", "weight_zero_point"), found, strict=True):
        state[leaf] = value[:, None] if name == "int8" else value
    compressor = BaseCompressor.get_value_from_registry(f"{layout}-quantized")
    return compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))


def awkward(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A matrix with rows and blocks of zeros, outliers, tiny values, and ties of every format."""
    draw = torch.Generator().manual_seed(seed)
    weight, places = torch.randn(96, 256, generator=draw) / 50, torch.arange(256)
    weight[1] = 0
    weight[2, 32:64] = 0
    weight[3, 5] = (3.0, 3.5, -3.0)[seed]  # the largest: half a block scale of 1, or 448 / 128
    weight[3, 6:13] = torch.tensor([0.125, 0.375, 0.625, 0.875, 1.25, 1.75, 2.5])  # of NVFP4
    weight[4] *= 1e-6
    weight[5, ::3], weight[5, 1::3] = -1e-30, -0.0
    weight[6] = (places - 127.5) / 1024  # of INT8
    weight[7] = (places % 16 - 7.5) / 64  # of INT4
    weight[8] = (places % 32 + 16) / 128  # of FP8
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_the_librarys(name: str, seed: int, dtype: torch.dtype) -> None:
    form = form_of(name, 32)
    weight = awkward(dtype, seed)
    mine, theirs = encoded(form, weight), library(name, form, weight)
    codes = theirs.get("weight_packed", theirs.get("weight"))
    assert torch.equal(raw(mine[form.codes]), raw(codes))
    assert mine["weight_scale"].dtype == theirs["weight_scale"].dtype
    assert torch.equal(raw(mine["weight_scale"]), raw(theirs["weight_scale"]))
    if name == "nvfp4":
        whole = mine["weight_scale_2"]
        assert whole.dtype == torch.float32 and whole.shape == ()
        assert torch.equal(whole, 1 / theirs["weight_global_scale"][0])


@settings(max_examples=40, deadline=None)
@given(largest=st.floats(2.0**-30, 2.0**20, width=32))
def test_the_global_scale_comes_back(largest: float) -> None:
    """Codes made with what the file tells are those of the library's own global scale."""
    weight = torch.linspace(-largest, largest, 4096).view(16, 256).to(torch.bfloat16)
    form = form_of("nvfp4")
    mine, theirs = encoded(form, weight), library("nvfp4", form, weight)
    assert torch.equal(mine["weight"], theirs["weight_packed"])
    assert torch.equal(mine["weight_scale"].float(), theirs["weight_scale"].float())


def test_a_matrix_of_zeros_means_zeros() -> None:
    for name in NAMES:
        form, weight = form_of(name), torch.zeros(4, 32, dtype=torch.bfloat16)
        mine, theirs = encoded(form, weight), library(name, form, weight)
        assert torch.equal(raw(mine["weight_scale"]), raw(theirs["weight_scale"]))
        assert torch.equal(form.decode(mine[form.codes], mine), weight.float())


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**32),
    exponent=st.integers(-20, 10),
)
def test_the_error_is_within_half_a_step(
    name: str, dtype: torch.dtype, seed: int, exponent: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(16, 64, generator=draw) * 2.0**exponent).to(dtype)
    form = form_of(name)
    found = encoded(form, weight)
    error = (form.decode(found[form.codes], found) - weight.float()).abs()
    scale = found["weight_scale"].float()
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20  # of a quotient, relative
    if name == "fp8":  # three bits behind the leading one; below 2^-6, steps of 2^-9
        bound = weight.float().abs() * (2.0**-4 + rounding) + scale * 2.0**-10
    elif name == "nvfp4":  # the widest step is from 4 to 6
        bound = (scale * found["weight_scale_2"]).repeat_interleave(16, 1) * (1 + rounding)
    else:
        steps = scale.repeat_interleave(64 // scale.shape[1], 1)
        bound = steps * 0.5 + weight.float().abs() * rounding
    assert (error <= bound * (1 + 2.0**-20)).all()
    assert error.square().sum() < weight.float().square().sum() * 0.03


@pytest.mark.parametrize(
    "words, message",
    [
        (("fp4", None), "--format fp4: not one of fp8, nvfp4, int8, int4"),
        (("fp8", 64), "--group 64: only int4 and int8 have groups"),
        (("int4", 12), "--group 12: not a multiple of 8"),
    ],
)
def test_formats_that_are_none(words: tuple[str, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_of(*words)
