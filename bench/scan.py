"""Claim: our chunked scan beats the stock reference scan on a CPU, forward and backward.

python -m bench.scan
"""

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from star_elastic import stock
from star_elastic.scan import chunk_scan

# batch, length, heads, head channels, groups, state, chunk
_SHAPES = {
    "demo": (64, 64, 8, 32, 1, 32, 64),
    "demo, long": (8, 512, 8, 32, 1, 32, 64),
    "Nemotron 3 Nano 30B layer": (1, 1024, 64, 64, 8, 128, 128),
}


def scan_speed(name: str, repeats: int = 9) -> dict[str, float]:
    """Median seconds of both scans at one shape, interleaved; `ratio` is stock over ours."""
    inputs = _inputs(*_SHAPES[name][:6])
    chunk = _SHAPES[name][6]
    scans: dict[str, Callable[..., Any]] = {"stock": mamba2_chunk_scan, "ours": chunk_scan}
    figures: dict[str, float] = {}
    for backward in (False, True):
        seconds: dict[str, list[float]] = {key: [] for key in scans}
        for repeat in range(repeats + 1):
            for key, scan in scans.items():
                start = time.perf_counter()
                _run(scan, inputs, chunk, backward)
                if repeat:
                    seconds[key].append(time.perf_counter() - start)
        kind = "forward_backward" if backward else "forward"
        for key, values in seconds.items():
            figures[f"{kind}_{key}_seconds"] = median(values)
        figures[f"{kind}_ratio"] = median(seconds["stock"]) / median(seconds["ours"])
    return figures


def _inputs(
    batch: int, length: int, heads: int, channels: int, groups: int, state: int
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(batch, length, heads, channels),
        "dt": torch.randn(batch, length, heads),
        "A": -torch.rand(heads) - 0.1,
        "B": torch.randn(batch, length, groups, state),
        "C": torch.randn(batch, length, groups, state),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def _run(scan: Callable[..., Any], inputs: dict[str, Tensor], chunk: int, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        y = scan(**inputs, chunk_size=chunk, dt_softplus=True)
        if backward:
            torch.autograd.grad(y.sum(), list(inputs.values()))


def main() -> None:
    """Print the figures as JSON."""
    stock.quiet()
    figures = {name: scan_speed(name) for name in _SHAPES}
    print(json.dumps({"threads": torch.get_num_threads(), **figures}, indent=2))


if __name__ == "__main__":
    main()
