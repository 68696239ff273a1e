"""Claim: sizes served from one copy of the weights, beside the engines that people run on CPUs.

    python -m bench.peers [--python .venv-engines/bin/python] [--checkpoint FOLDER]
                          [--kind dense|hybrid] [--dtype float32] [--repeats 5]

Of one elastic checkpoint: our engine on views of the one parent; stock transformers on the size cut
out to a folder; llama.cpp on the size exported as one GGUF file; vLLM on the size out of the
checkpoint. Greedy, no stop, prompts new in every round and the same for all. *alone* is tokens a
second after the first one, of one sequence; *crowd* is tokens a second of 16 at once, their prompts
included; *one_by_one* is that of one at a time. Each engine is a process of its own, stopped but
for its turn; turns rotate, each warms up first. Ratios are medians of the rounds' own, ours over
the peer's: below 1 the peer is faster. *cores* is processor time over time: less than the threads
on a busy machine, and of an engine that lets threads rest.

`make test-engines` makes the peers' environment. vLLM's resident bytes contain a cache of one GiB a
process, and it compiles unless told not to (`--eager`); in fp32 llama.cpp's cache is fp32.
Stock `generate` has no queue: its *crowd* is one batch of prompts of equal length, its best case.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.engine import ratio_of
from bench.peers_there import Ids, Spec
from bench.serving import make_model
from star_elastic import stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.export.gguf import make_plan, type_of, write_gguf
from star_elastic.slicing import slice_checkpoint

OURS = "ours"
PEERS = ("transformers", "llama_cpp", "vllm")
_GGUF = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_Found = dict[str, list[float]]  # a figure of each round, by name


class Worker:
    """An engine's process: answers in its turn, and is stopped between turns."""

    def __init__(self, python: str, engine: str, spec: Spec):
        # OMP_NUM_THREADS: engines that count cores would take another number
        environment = os.environ | {
            "OMP_NUM_THREADS": str(spec.threads),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "HF_HUB_OFFLINE": "1",
        }
        self._child = subprocess.Popen(
            [python, "-m", "bench.peers_there", engine, json.dumps(asdict(spec))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        self.engine, self.size = engine, spec.size
        self.about = self._hear()
        self._signal(signal.SIGSTOP)

    def ask(self, prompts: Ids, size: str, tokens: int) -> dict[str, Any]:
        """The answers (`tokens`), the `seconds` they took, and how many `cores` it had for them."""
        assert self._child.stdin is not None
        self._signal(signal.SIGCONT)
        print(json.dumps({"prompts": prompts, "size": size, "tokens": tokens}),
              file=self._child.stdin, flush=True)  # fmt: skip
        heard = self._hear()
        self._signal(signal.SIGSTOP)
        return heard

    def resident_bytes(self) -> int:
        """Of the whole group of processes; what several map counts as a share of each."""
        found = 0
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if os.getpgid(int(path.name)) == self._child.pid:
                    lines = (path / "smaps_rollup").read_text().splitlines()
                    found += sum(1024 * int(x.split()[1]) for x in lines if x.startswith("Pss:"))
        return found

    def close(self) -> None:
        """End it, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._child.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self._child.pid, number)

    def _hear(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"{self.engine} at size {self.size}: its process ended")
        return json.loads(line)


class Bench:
    """What is asked of every engine, and what they told."""

    def __init__(self, asked: argparse.Namespace, vocabulary: int):
        self.asked, self._vocabulary = asked, vocabulary
        self._draw = torch.Generator().manual_seed(1)
        self.found: dict[tuple[str, str], _Found] = defaultdict(lambda: defaultdict(list))
        self.said: dict[tuple[str, str], Ids] = defaultdict(list)

    def prompts(self, count: int) -> Ids:
        """Random ones, new at every call, so that none begins as one before it."""
        shape = (count, self.asked.prompt)
        return torch.randint(4, self._vocabulary, shape, generator=self._draw).tolist()

    def round(self, workers: dict[str, Worker], size: str, number: int) -> None:
        """All engines once, each in its turn; the first one rotates."""
        tokens, crowd = self.asked.tokens, self.asked.crowd
        warm, first, alone, many = (self.prompts(n) for n in (crowd, 1, 1, crowd))
        names = list(workers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            worker, found = workers[name], self.found[name, size]
            worker.ask(warm[:1], size, 2)
            worker.ask(warm[1:], size, 2)
            before = worker.ask(first, size, 1)["seconds"]
            single = worker.ask(alone, size, tokens)
            together = worker.ask(many, size, tokens)
            whole = single["seconds"]
            found["first_ms"].append(1e3 * before)
            found["alone"].append((tokens - 1) / (whole - before))
            found["one_by_one"].append(tokens / whole)
            found["crowd"].append(crowd * tokens / together["seconds"])
            found["cores_alone"].append(single["cores"])
            found["cores_in_a_crowd"].append(together["cores"])
            self.said[name, size].append(single["tokens"][0])

    def report(self, engine: str, size: str) -> dict[str, Any]:
        """Medians of an engine at a size, and ours over them."""
        ours, found = self.found[OURS, size], self.found[engine, size]
        row: dict[str, Any] = {name: round(median(each), 2) for name, each in found.items()}
        if engine == OURS:
            return row
        pairs = [("alone", "alone"), ("crowd", "crowd"), ("crowd", "one_by_one")]
        row["ours_over_it"] = {
            f"{mine}/{its}": round(ratio_of(ours[mine], found[its]), 3) for mine, its in pairs
        }
        row["faster_alone"], row["faster_in_a_crowd"] = (
            "ours" if row["ours_over_it"][f"{name}/{name}"] > 1 else engine
            for name in ("alone", "crowd")
        )
        both = zip(self.said[OURS, size], self.said[engine, size], strict=True)
        same = [_agreed(mine, its) for mine, its in both]
        row["tokens_equal_ours"] = all(n == self.asked.tokens for n in same)
        row["least_tokens_equal"] = min(same)
        return row


def _agreed(some: list[int], others: list[int]) -> int:
    """How many tokens are equal before the first that is not."""
    pairs = enumerate(zip(some, others, strict=True))
    return next((n for n, (a, b) in pairs if a != b), len(some))


def make_paths(
    opened: Checkpoint, sizes: list[str], scratch: Path, dtype: str
) -> dict[str, dict[str, Path]]:
    """What each peer reads, by size."""
    paths: dict[str, dict[str, Path]] = {name: {} for name in PEERS}
    for size in sizes:
        folder, file = scratch / f"cut-{size}", scratch / f"{size}.gguf"
        slice_checkpoint(opened, folder, size, overwrite=True)
        # ids are all that is asked for; llama.cpp needs no tokenizer then
        plan = make_plan(opened, opened.size(size), type_of(_GGUF[dtype]), with_tokenizer=False)
        write_gguf(plan, file, overwrite=True)
        paths["transformers"][size], paths["llama_cpp"][size] = folder, file
        paths["vllm"][size] = opened.path
    return paths


@contextlib.contextmanager
def running(
    asked: argparse.Namespace, opened: Checkpoint, sizes: list[str], scratch: Path
) -> Iterator[dict[tuple[str, str], Worker]]:
    """A process of ours for all sizes, and one for each size of each peer; all stopped."""
    spec = Spec(
        str(opened.path), None, asked.dtype, asked.threads, asked.crowd,
        asked.prompt + asked.tokens, asked.eager,
    )  # fmt: skip
    paths = make_paths(opened, sizes, scratch, asked.dtype)
    pythons = {"transformers": sys.executable}
    workers: dict[tuple[str, str], Worker] = {}
    with contextlib.ExitStack() as stack:

        def start(python: str, engine: str, its: Spec) -> Worker:
            worker = Worker(python, engine, its)
            stack.callback(worker.close)
            return worker

        one = start(sys.executable, OURS, spec)
        for size in sizes:
            workers[OURS, size] = one
            for peer in asked.peers.split(","):
                its = replace(spec, path=str(paths[peer][size]), size=size)
                python = pythons.get(peer, str(asked.python.absolute()))
                workers[peer, size] = start(python, peer, its)
        yield workers


def memory(
    opened: Checkpoint, workers: dict[tuple[str, str], Worker], sizes: list[str], dtype: str
) -> dict[str, Any]:
    """Bytes with all sizes up: of weights, reckoned from counts, and resident, as measured."""
    element = getattr(torch, dtype).itemsize
    counts = {size: opened.space.sizes[size].total_params for size in sizes}
    weights = {OURS: element * opened.layout.count(), "a_peer": element * sum(counts.values())}
    resident: dict[str, int] = {}
    for name in dict.fromkeys(engine for engine, _ in workers):
        processes = {workers[name, size] for size in sizes}
        resident[name] = sum(worker.resident_bytes() for worker in processes)
    return {
        "sizes": sizes,
        "weights_bytes": weights,
        "weights_ours_over_a_peer": round(weights[OURS] / weights["a_peer"], 3),
        "resident_bytes": resident,
        "resident_ours_over_it": {
            name: round(resident[OURS] / each, 3) for name, each in resident.items() if name != OURS
        },
    }


def measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All figures of one checkpoint."""
    folder = asked.checkpoint or scratch / asked.kind
    if asked.checkpoint is None:
        make_model(asked.kind, asked.width, asked.layers).save_pretrained(folder)
    opened = Checkpoint.open(folder)
    assert opened.space is not None
    counts = {name: size.total_params for name, size in opened.space.sizes.items()}
    sizes = sorted(counts, key=lambda name: counts[name], reverse=True)
    before = os.getloadavg()[0]
    bench = Bench(asked, opened.layout.sizes["vocab_size"])
    with running(asked, opened, sizes, scratch) as workers:
        engines = list(dict.fromkeys(engine for engine, _ in workers))
        for number in range(asked.repeats):
            for size in (sizes[0], sizes[-1]):
                bench.round({name: workers[name, size] for name in engines}, size, number)
        return {
            "parameters": counts,
            "load_before": round(before, 2),  # near 0 on an idle machine
            "engines": {name: workers[name, sizes[0]].about for name in engines},
            "memory": memory(opened, workers, sizes, asked.dtype),
            "tokens_a_second": {
                size: {name: bench.report(name, size) for name in engines}
                for size in (sizes[0], sizes[-1])
            },
        }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", type=Path, default=Path(".venv-engines/bin/python"))
    parser.add_argument("--checkpoint", type=Path, help="instead of one made on the spot")
    parser.add_argument("--kind", choices=["dense", "hybrid"], default="dense")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=10, help="of a dense one")
    parser.add_argument("--dtype", choices=list(_GGUF), default="float32")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--crowd", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="vLLM does not compile")
    asked = parser.parse_args()
    stock.quiet()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(asked, Path(scratch)), indent=2))


if __name__ == "__main__":
    main()
