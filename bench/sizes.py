"""Claims: three sizes cost the bytes of one parent; making a size from a loaded parent is instant.

python -m bench.sizes CHECKPOINT
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from star_elastic import stock
from star_elastic.model import ElasticModel
from star_elastic.submodel import Fields


def resident(model: ElasticModel) -> dict[str, float]:
    """Bytes of the parent, of all named sizes together, and their ratio."""
    parent = sum(tensor.numel() * tensor.element_size() for tensor in model.state.values())
    copied = sum(model.copied_bytes(model[name]) for name in model.sizes)
    return {
        "parent_bytes": parent,
        "all_sizes_bytes": parent + copied,
        "ratio": (parent + copied) / parent,
    }


def new_size_seconds(model: ElasticModel, repeats: int = 9) -> dict[str, float]:
    """Median seconds to make each named size anew."""
    return {name: _making(model, size.config, repeats) for name, size in model.sizes.items()}


def _making(model: ElasticModel, fields: Fields, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.submodel(**fields)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    stock.quiet()
    model = ElasticModel.from_pretrained(parser.parse_args().checkpoint)
    figures: dict[str, Any] = {"resident": resident(model), "seconds": new_size_seconds(model)}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
