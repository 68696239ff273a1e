"""Claims: sizes served from one copy of the weights lose nothing to models of their own.

    python -m bench.engine SCRATCH [--checkpoint FOLDER] [--families llama,nemotron_h] [--rounds 9]
                           [--times 1]

Greedy, on one device, everything interleaved; ratios are medians of the rounds' own. A size through
the engine against stock `generate` of the same size, cut out to a folder (one at a time): tokens a
second at 1 and at 16 sequences. Views against copies, both through the engine. Bytes of the weights
of all sizes together over the parent's. What changing the size from step to step adds to a step.
The time to the first token of a prompt of 512 tokens, new and repeated. What `add_size` takes.
Prompts differ from round to round, so that nothing but the last of these finds a prefix.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from star_elastic import stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.serve.engine import Engine, Request
from star_elastic.serve.sampling import Sampling
from star_elastic.slicing import slice_checkpoint
from star_elastic.submodel import ElasticSpace

CROWD = 16
LONG = 512
_ENDLESS = Sampling(stop_ids=frozenset())
_SHAPE = dict(
    vocab_size=8192, hidden_size=512, num_attention_heads=8, head_dim=64,
    max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SHAPE | dict(intermediate_size=1536, num_hidden_layers=6, num_key_value_heads=4),
    "nemotron_h": _SHAPE
    | dict(
        hybrid_override_pattern="MEM*ME", num_key_value_heads=2, intermediate_size=1536,
        mamba_num_heads=16, mamba_head_dim=64, n_groups=4, ssm_state_size=64, conv_kernel=4,
        chunk_size=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=512,
        moe_shared_expert_intermediate_size=512,
    ),
}  # fmt: skip
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "full": {},
        "middle": dict(hidden_size=448, intermediate_size=1280),
        "small": dict(hidden_size=384, intermediate_size=1024),
    },
    "nemotron_h": {
        "full": {},
        "middle": dict(hidden_size=448, moe_intermediate_size=448),
        "small": dict(hidden_size=384, moe_intermediate_size=384),
    },
}


_WIDTHS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size", "num_attention_heads", "num_key_value_heads",
    "mamba_num_heads",
)  # fmt: skip


def write_parent(family: str, folder: Path, times: int) -> None:
    """An elastic checkpoint of random weights with three sizes, so many times as wide."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_wider(_CONFIGS[family], times))
    model = ElasticModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    model.space = ElasticSpace.of(
        model.layout,
        {name: _wider(fields, times) for name, fields in _SIZES[family].items()},
        trained=True,
    )
    model.save_pretrained(folder, overwrite=True)


def _wider(fields: dict[str, Any], times: int) -> dict[str, Any]:
    return {name: value * times if name in _WIDTHS else value for name, value in fields.items()}


class Bench:
    """A checkpoint, the size that is looked at, and the same size cut out."""

    def __init__(self, folder: Path, size: str | None, scratch: Path, device: str, tokens: int):
        self.model = ElasticModel.from_pretrained(folder, device=device)
        counts = {name: each.active_params for name, each in self.model.sizes.items()}
        self.size = size or min(counts, key=lambda name: counts[name])
        self.largest = max(counts, key=lambda name: counts[name])
        cut = scratch / f"{folder.name}-{self.size}"
        slice_checkpoint(Checkpoint.open(folder), cut, self.size, overwrite=True)
        self.copy = ElasticModel.from_pretrained(cut, device=device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            cut, dtype="auto", trust_remote_code=False
        )
        self.stock = loaded.eval().to(device)
        positions = self.model.parent.config.max_position_embeddings
        self.tokens, self.prompt, self.long = tokens, 32, min(LONG, positions - 8)
        length = max(self.long + 8, self.prompt + tokens)
        self.engine = Engine(self.model, CROWD, length)
        self.engine_of_copy = Engine(self.copy, CROWD, length)
        self._draw = torch.Generator().manual_seed(1)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random ones, new at every call."""
        vocabulary = self.model.layout.sizes["vocab_size"]
        return torch.randint(1, vocabulary, (count, length), generator=self._draw).tolist()

    def views(self, prompts: list[list[int]]) -> float:
        """Tokens a second of the engine."""
        return _rate(self.engine, self.size, prompts, self.tokens)

    def copies(self, prompts: list[list[int]]) -> float:
        """Likewise, of the engine on the size cut out."""
        return _rate(self.engine_of_copy, "full", prompts, self.tokens)

    def generate(self, prompts: list[list[int]]) -> float:
        """Likewise, of stock `generate` on the first of the prompts."""
        ids = torch.tensor(prompts[:1], device=self.stock.device)
        seen = torch.ones_like(ids)
        begun = time.perf_counter()
        self.stock.generate(
            ids, attention_mask=seen, max_new_tokens=self.tokens, min_new_tokens=self.tokens,
            do_sample=False,
        )  # fmt: skip
        return self.tokens / (time.perf_counter() - begun)

    def step_ms(self, size: str) -> float:
        """A step at a size: one token in, one token out."""
        return self.first_ms(self.prompts(1, 1)[0], size)

    def first_ms(self, prompt: Sequence[int], size: str) -> float:
        """The time to the first token."""
        id = self.engine.submit(Request(prompt, size, 1, _ENDLESS))
        begun = time.perf_counter()
        while not any(event.id == id for event in self.engine.step()):
            pass
        return 1e3 * (time.perf_counter() - begun)

    def switch_ms(self) -> dict[str, float]:
        """A step after one at the same size, and after one at the other, of both sizes."""
        found: dict[str, float] = {}
        for size, other in ((self.size, self.largest), (self.largest, self.size)):
            self.step_ms(size)
            stayed = median(self.step_ms(size) for _ in range(4))
            came = median((self.step_ms(other), self.step_ms(size))[1] for _ in range(4))
            found |= {f"{size}_stayed": stayed, f"{size}_came": came}
        return found

    def prefix_ms(self) -> dict[str, float]:
        """The first token of a long prompt that is new, and again."""
        (prompt,) = self.prompts(1, self.long)
        return {"new": self.first_ms(prompt, self.size), "again": self.first_ms(prompt, self.size)}

    def add_ms(self) -> dict[str, float]:
        """A size more in a running engine, in a pool that is there."""
        fields = self.model.sizes[self.size].config
        begun = time.perf_counter()
        self.engine.add_size("one more", fields)
        took = 1e3 * (time.perf_counter() - begun)
        self.engine.remove_size("one more")
        return {"add_size": took}

    def memory(self) -> dict[str, float]:
        """Bytes of all weights, each storage once."""
        parent = _bytes([self.model.parent])
        views = [self.model[name] for name in self.model.sizes]
        return {"parent": parent, "with_all_sizes": _bytes([self.model.parent, *views])}


def _rate(engine: Engine, size: str, prompts: list[list[int]], tokens: int) -> float:
    begun = time.perf_counter()
    engine.generate(prompts, size, tokens, _ENDLESS)
    return len(prompts) * tokens / (time.perf_counter() - begun)


def _bytes(models: list[PreTrainedModel]) -> int:
    def tensors() -> Iterator[Tensor]:
        for model in models:
            yield from stock.get_tensors(model).values()

    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
    return sum(storages.values())


def interleaved(
    ways: dict[str, Callable[[], dict[str, float]]], rounds: int
) -> dict[str, list[float]]:
    """What each of some measurements told in each round; a first round warms up."""
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for way in ways.values():
            for name, value in way().items():
                found.setdefault(name, []).append(value)
        if not number:
            found.clear()
    return found


def ratio_of(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """All figures of one checkpoint."""

    def speed(count: int) -> dict[str, float]:
        prompts = bench.prompts(count, bench.prompt)
        ways = {"views": bench.views, "copies": bench.copies, "generate": bench.generate}
        return {f"{name}_{count}": way(prompts) for name, way in ways.items()}

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "alone": lambda: speed(1),
        "crowd": lambda: speed(CROWD),
        "switch": bench.switch_ms,
        "prefix": bench.prefix_ms,
        "add": bench.add_ms,
    }
    found = interleaved(ways, rounds)

    def ratio(above: str, below: str) -> float:
        return ratio_of(found[above], found[below])

    size, largest = bench.size, bench.largest
    memory = bench.memory()
    return {
        "size": size,
        "tokens_a_second_and_ms": {name: median(values) for name, values in found.items()},
        "alone_over_generate": ratio("views_1", "generate_1"),
        f"{CROWD}_at_once_over_generate": ratio(f"views_{CROWD}", f"generate_{CROWD}"),
        "views_over_copies": [ratio(f"views_{n}", f"copies_{n}") for n in (1, CROWD)],
        "weights_over_parent": memory["with_all_sizes"] / memory["parent"],
        "switch_adds_ms": {
            name: median(
                came - stayed
                for came, stayed in zip(found[f"{name}_came"], found[f"{name}_stayed"], strict=True)
            )
            for name in (size, largest)
        },
        "first_token_new_over_again": ratio("new", "again"),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--size", help="the one looked at; the smallest if not given")
    parser.add_argument("--families", default="llama,nemotron_h", help="of parents made here")
    parser.add_argument("--times", type=int, default=1, help="as wide, those made here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    stock.quiet()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    folders = [asked.scratch / f"engine-{family}" for family in asked.families.split(",")]
    if asked.checkpoint is not None:
        folders = [asked.checkpoint]
    else:
        for folder in folders:
            write_parent(folder.name.removeprefix("engine-"), folder, asked.times)
    torch.manual_seed(0)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for folder in folders:
        bench = Bench(folder, asked.size, asked.scratch, asked.device, asked.tokens)
        report[folder.name] = measure(bench, asked.rounds)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
