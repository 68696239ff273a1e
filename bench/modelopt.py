"""Claim: what we write as NVFP4 is ModelOpt's own: the same meaning, and in float32 the same codes.

    python -m bench.modelopt        in an environment that has nvidia-modelopt 0.47 (and omegaconf)

ModelOpt reckons in float32 whatever the dtype; `quantize` reckons in the matrix's own, as
compressed-tensors does, so that in bfloat16 some scales and codes differ by a step.
"""

import json

import torch

from star_elastic.precision import NVFP4


def main() -> None:
    """Print what differs, in bfloat16 and in float32, on a matrix of normal numbers."""
    from modelopt.torch.quantization.qtensor import (  # pyright: ignore[reportMissingImports]
        NVFP4QTensor,
    )

    form, draw = NVFP4(), torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(512, 1024, generator=draw).to(dtype)
        theirs, scale, whole = NVFP4QTensor.quantize(weight, form.block)
        codes = theirs._quantized_data
        mine = form.whole(weight.abs().amax())
        mine |= form.rows(weight, mine)
        encoded = form.encode(weight, mine)
        meant = NVFP4QTensor(weight.shape, dtype, encoded).dequantize(
            dtype=torch.float32,
            scale=mine["weight_scale"],
            double_scale=mine["weight_scale_2"],
            block_sizes={-1: form.block},
        )
        same = scale.view(torch.uint8) == mine["weight_scale"].view(torch.uint8)
        found = {"weight_scale": scale, "weight_scale_2": whole}
        errors = [
            (decoded - weight.float()).square().mean().item()
            for decoded in (form.decode(codes, found), form.decode(encoded, mine))
        ]
        row = {
            "dtype": str(dtype),
            "scales that differ": int((~same).sum()) / same.numel(),
            "bytes of codes that differ": int((codes != encoded).sum()) / codes.numel(),
            "our codes, decoded by theirs and by us, differ by": (
                (meant - form.decode(encoded, mine)).abs().max().item()
            ),
            "squared error of theirs, of ours": errors,
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
