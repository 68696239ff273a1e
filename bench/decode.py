"""Claims: the speed of decoding, and the bytes held, of sizes that run on codes against BF16.

    python -m bench.decode SCRATCH [--pattern M*E] [--formats fp8,nvfp4,int8] [--device cpu]

A parent of Nemotron 3 Nano's shapes with as many of its layers as the pattern says is written once,
and quantized once a format. One sequence is decoded greedily at every size; sizes of all formats
take turns. Codes are decoded as rows are needed, by plain torch: kernels that compute on them are
the engines' (docs/engines.md). On a GPU: `--device cuda --pattern MEM*EME`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.nano import write_parent
from star_elastic import ElasticModel, stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.precision import format_of
from star_elastic.quantize import make_plan, quantize_checkpoint

_PROMPT = 16  # tokens


def folders(scratch: Path, pattern: str, formats: list[str]) -> dict[str, Path]:
    """The parent, and its codes in every format."""
    found = {"bf16": scratch / f"decode-{pattern.replace('*', 'A')}"}
    if not found["bf16"].exists():
        write_parent(found["bf16"], pattern)
    opened = Checkpoint.open(found["bf16"], check_digests=False)
    for name in formats:
        group = 64 if name == "int4" else None
        found[name] = found["bf16"].with_name(f"{found['bf16'].name}-{name}")
        if not found[name].exists():
            quantize_checkpoint(make_plan(opened, format_of(name, group)), found[name])
    return found


@torch.no_grad()
def seconds_a_token(model: PreTrainedModel, tokens: int) -> float:
    """Of decoding at batch 1, once the prompt is read."""
    device = model.device
    ids = torch.arange(_PROMPT, device=device)[None]
    output = model(input_ids=ids, use_cache=True)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(tokens):
        ids = output.logits[:, -1:].argmax(-1)
        cache = output.past_key_values
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
    _synchronize(device)
    return (time.perf_counter() - start) / tokens


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--pattern", default="M*E")
    parser.add_argument("--formats", default="fp8,nvfp4,int8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    stock.quiet()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    kinds = folders(arguments.scratch, arguments.pattern, arguments.formats.split(","))
    models = {
        kind: ElasticModel.from_pretrained(path, device=arguments.device, check_digests=False)
        for kind, path in kinds.items()
    }
    took: dict[str, dict[str, list[float]]] = {kind: {} for kind in models}
    for _ in range(arguments.runs):
        for name in models["bf16"].sizes:
            for kind, model in models.items():
                found = seconds_a_token(model[name], arguments.tokens)
                took[kind].setdefault(name, []).append(found)
    rows: list[dict[str, Any]] = []
    for kind, model in models.items():
        held = sum(tensor.nbytes for tensor in model.state.values())
        for name, seconds in took[kind].items():
            ratio = median(took["bf16"][name]) / median(seconds)
            rows.append(
                {
                    "format": kind,
                    "size": name,
                    "tokens_per_second": 1 / median(seconds),
                    "speed_over_bf16": ratio,
                    "bytes_of_all_sizes": held,
                    "bytes_copied_for_this": model.copied_bytes(model[name]),
                }
            )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
