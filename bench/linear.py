"""Claim: products of few tokens are faster if every core reads a part of the weight.

    python -m bench.linear [--threads 2] [--repeats 15]

Weights of some shapes, and views of three quarters and of half of them, more of each than caches
hold, in turns: `F.linear` against `linear_by_parts`. Microseconds a product, medians of the rounds;
`gain` is how many times faster the latter is, `over_one_each` how many times faster than with one
part for each core, and `over_a_copy` what it takes on the view over what it takes on a copy without
gaps.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.engine import interleaved, ratio_of
from star_elastic.serve.linear import linear_by_parts, parts_of

_SHAPES = [(1536, 512), (4096, 1024), (1024, 4096), (6144, 2048)]
_SHARES = [1.0, 0.75, 0.5]
_TOKENS = [1, 2, 4, 16, 64, 256]
_BYTES = 3 * 2**27  # of all weights of a shape


def measure(
    weights: Sequence[Tensor], copies: Sequence[Tensor], tokens: int, cores: int, repeats: int
) -> dict[str, float]:
    """Microseconds a product, each way."""
    input_TI = torch.randn(tokens, weights[0].shape[1])
    parts = parts_of(len(weights[0]), cores)

    def stock(weight: Tensor) -> Tensor:
        return F.linear(input_TI, weight)

    def one_each(weight: Tensor) -> Tensor:
        return linear_by_parts(input_TI, weight, None, cores)

    def shared(weight: Tensor) -> Tensor:
        return linear_by_parts(input_TI, weight, None, parts)

    def turn() -> dict[str, float]:
        return {
            "linear": _each(stock, weights),
            "a part a core": _each(one_each, weights),
            "parts": _each(shared, weights),
            "parts of a copy": _each(shared, copies),
        }

    found = interleaved({"turn": turn}, repeats)
    linear, by_cores, by_parts, of_a_copy = found.values()
    return {name: round(median(each), 1) for name, each in found.items()} | {
        "gain": round(ratio_of(linear, by_parts), 2),
        "over_one_each": round(ratio_of(by_cores, by_parts), 2),
        "over_a_copy": round(ratio_of(by_parts, of_a_copy), 2),
    }


def _each(product: Callable[[Tensor], Any], weights: Sequence[Tensor]) -> float:
    begun = time.perf_counter()
    for weight in weights:
        product(weight)
    return 1e6 * (time.perf_counter() - begun) / len(weights)


@torch.inference_mode()
def main() -> None:
    """Print a line of JSON for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for shape in _SHAPES:
        whole = [torch.randn(shape) for _ in range(_BYTES // (4 * shape[0] * shape[1]))]
        for share in _SHARES:
            rows, columns = (int(share * size) for size in shape)
            views = [weight[:rows, :columns] for weight in whole]
            copies = [view.contiguous() for view in views]
            for tokens in _TOKENS:
                found = measure(views, copies, tokens, asked.threads, asked.repeats)
                print(json.dumps({"of": shape, "share": share, "tokens": tokens, **found}))


if __name__ == "__main__":
    main()
