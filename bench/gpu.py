"""Claims that need a GPU: the cost of router and sizes there, and steps of a 30B-shaped stack.

A stack of Nemotron 3 Nano's blocks, as many as the memory holds in bfloat16 compute with float32
weights and AdamW, takes training steps at each size: tokens per second and model FLOP utilisation.

    python -m bench.gpu router      # the table of bench.router_cost on this device
    python -m bench.gpu stack --layers 4 --peak-tflops 989
    python -m bench.gpu codes       # bench.decode: FP8, NVFP4 and INT8 weights against BF16
    python -m bench.gpu serve       # bench.serve_gpu: decoding at three sizes of one 30B
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

import torch
from torch import nn

from bench.nano import SIZES, nano_config
from bench.serve_gpu import serve
from bench.step_cost import Fixed, fixed_batch
from star_elastic.layout import Layout
from star_elastic.submodel import Fields
from star_elastic.train.distributed import World
from star_elastic.train.parts import Parts
from star_elastic.train.recipe import Optimise, Stage
from star_elastic.train.teacher import Teacher
from star_elastic.train.trainer import Trainer


def parts_of(layout: Layout, dtype: torch.dtype, device: str) -> Parts:
    """Random weights of a layout, never held twice."""
    state: dict[str, torch.Tensor] = {}
    for name, weight in layout.weights.items():
        shape = weight.shape(layout.sizes)
        tensor = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
        state[name] = tensor.float() if weight.is_buffer else nn.Parameter(tensor)
    return Parts(layout, state)


def flops(layout: Layout, fields: Fields, tokens: int) -> float:
    """Training FLOPs of a size and its teacher's forward pass, matrix products only."""
    sizes = layout.sizes_of(fields)
    embeddings = layout.sizes["vocab_size"] * sizes["hidden_size"]
    student = layout.count_active(sizes) - embeddings
    teacher = layout.count_active() - layout.sizes["vocab_size"] * layout.sizes["hidden_size"]
    return tokens * (6.0 * student + 2.0 * teacher)


def stack(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median step time, tokens per second and utilisation per size."""
    pattern = "".join("MEM*EMEMEM*E"[n % 12] for n in range(arguments.layers or 4))
    layout = Layout(nano_config(pattern, arguments.experts, "float32"))
    batch = fixed_batch(layout.sizes["vocab_size"], 1, arguments.length).to(
        torch.device(arguments.device)
    )
    streams: Any = lambda number: Fixed(batch)  # noqa: E731
    teacher = Teacher(parts_of(layout, torch.bfloat16, arguments.device))
    settings = Optimise(
        stages=[Stage(steps=10**6, sequence_length=arguments.length, rows=1)],
        dtype="bfloat16",
        checkpoint_activations=True,
    )
    parts = parts_of(layout, torch.float32, arguments.device)
    here = World(device=torch.device(arguments.device))
    found: dict[str, Any] = {"pattern": pattern, "parameters": layout.count()}
    trainer = Trainer(parts, SIZES, settings, streams, teacher, here=here)
    for name, fields in SIZES.items():
        trainer.sizes.clear()
        trainer.sizes[name] = fields
        took = median(_timed(trainer) for _ in range(arguments.repeats))
        used = flops(layout, fields, arguments.length) / took / (arguments.peak_tflops * 1e12)
        found[name] = {"seconds": took, "tokens_per_second": arguments.length / took, "mfu": used}
    if arguments.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["device"] = torch.cuda.get_device_name()
    return found


def _timed(trainer: Trainer) -> float:
    start = time.perf_counter()
    trainer.step()
    if trainer.here.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["router", "stack", "codes", "serve"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="4 of a stack, all 52 to serve")
    parser.add_argument("--batches", default="36,108,224", help="of full, medium, small")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 of the device")
    arguments = parser.parse_args()
    if arguments.what == "stack":
        print(json.dumps(stack(arguments), indent=2))
    elif arguments.what == "serve":
        batches = [int(batch) for batch in arguments.batches.split(",")]
        layers, experts = arguments.layers or 52, arguments.experts
        found = serve(layers, experts, batches, 64, arguments.repeats, arguments.device)
        print(json.dumps(found, indent=2))
    elif arguments.what == "codes":
        with tempfile.TemporaryDirectory() as folder:
            words = [folder, "--device", arguments.device, "--pattern", "MEM*EME", "--tokens", "32"]
            subprocess.run([sys.executable, "-m", "bench.decode", *words], check=True)
    else:
        words = ["demo/parent", "--device", arguments.device, "--rows", "64"]
        subprocess.run([sys.executable, "-m", "bench.router_cost", *words], check=True)


if __name__ == "__main__":
    main()
