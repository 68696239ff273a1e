"""Coverage-guided fuzzing of what a checkpoint says about itself: any error but ours is a finding.

    python -m bench.fuzz header|index|elastic --runs N --seed S [--seconds T]

Each input is a sound declaration with a few things spoiled in it (a value, a key, some bytes), or
bytes as they come; libFuzzer, through atheris (Linux), keeps what reaches new code and goes on from
there. An input may be refused (`ValueError`), in one printable line and within a second; what is
accepted is held to what the code behind relies on. Anything else ends the run with an error, and
writes the input to `crash-*`.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import atheris as _atheris

atheris: Any = _atheris  # it has no types, and half of it is native
with atheris.instrument_imports(include=["star_elastic"]):
    from star_elastic import configs
    from star_elastic.dtypes import STORED_ITEMSIZE
    from star_elastic.folder import Spec, one_line
    from star_elastic.folder.header import Stored, header_bytes, parse_header
    from star_elastic.folder.index import check_index, parse_index
    from star_elastic.layout import Layout
    from star_elastic.submodel import ElasticSpace, read_declaration

_SECONDS = 1.0  # of computing, for one input
_LONGEST = 2**10  # bytes that decide what is spoiled, and how
_CONFIG = {
    "model_type": "nemotron_h",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 2,
    "n_groups": 2,
    "ssm_state_size": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "moe_shared_expert_intermediate_size": 4,
    "hybrid_override_pattern": "M*E-",
}
_SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"hidden_size": 4, "num_attention_heads": 2, "mamba_num_heads": 2},
    "uneven": {"intermediate_size": [8, 8, 8, 4], "n_routed_experts": 3, "num_hidden_layers": 3},
}
_SPECS = [
    Spec("a.weight", "F32", (2, 3)),
    Spec("a.scale", "F8_E4M3", (1,)),
    Spec("b.0.weight", "BF16", (4,)),
    Spec("b.empty", "I64", (0,)),
]
_JUNK: list[Any] = [
    *(-(2**63), -1, 0, 1, 2, 8, 2**31, 2**48, 2**63 - 64, 2**63, 2**64, 10**400),
    *(0.5, 1.0, 1e308, math.inf, -math.inf, math.nan, None, True, False),
    *(
        "",
        ".",
        "..",
        "../x",
        "/x",
        "a/b",
        "C:\\x",
        "a\0",
        "a\n",
        "\x1b[2J",
        "\ud800",
        "ß",
        "A.weight",
    ),
    *(
        "x" * 300,
        "F32",
        "F4",
        "full",
        "hidden_size",
        "model.safetensors",
        "x.bin",
        "sha256:" + "0" * 64,
    ),
    *([], {}, [[]], [1] * 9, {"a": 1}),
]
_NAMES = [each for each in _JUNK if isinstance(each, str)]
Target = Callable[[Any], None]


def spoiled(source: Any, sound: str) -> bytes:
    """A JSON text with a few things changed: first what it says, then how it is written."""
    value = [json.loads(sound)]
    for _ in range(source.ConsumeIntInRange(0, 4)):
        _spoil(source, value)
    text = json.dumps(value[0] if value else None).encode()
    for _ in range(source.PickValueInList([0, 0, 0, 1, 2])):
        start = source.ConsumeIntInRange(0, len(text))
        end = min(len(text), start + source.ConsumeIntInRange(0, 8))
        there = text[start:end]
        text = text[:start] + source.PickValueInList([b"", there * 2, b",", b"["]) + text[end:]
    return text


def _spoil(source: Any, value: Any) -> None:
    """Change one place of nested lists and maps; seldom the whole, which says little."""
    inner, likely = value, 15
    while isinstance(inner, dict | list) and inner:
        value, key = inner, _place(source, inner)
        inner = value[key]
        if source.ConsumeIntInRange(0, likely) == likely:
            break
        likely = 3
    if not value:
        return
    change = source.ConsumeIntInRange(0, 4)
    if change == 1 and isinstance(inner, int):
        value[key] = inner + source.ConsumeIntInRange(-4, 4)
    elif change == 2 and isinstance(value, list):
        value.insert(key, copy.deepcopy(inner))
    elif change == 2:
        value[source.PickValueInList(_NAMES)] = copy.deepcopy(inner)
    elif change == 3:
        del value[key]
    else:
        value[key] = copy.deepcopy(source.PickValueInList(_JUNK))


def _place(source: Any, value: dict[str, Any] | list[Any]) -> Any:
    if isinstance(value, list):
        return source.ConsumeIntInRange(0, len(value) - 1)
    return source.PickValueInList(list(value))


def header_target() -> Target:
    """Bytes of a safetensors header, and the size of the file that they stand in."""
    sound = header_bytes(_SPECS)[8:].decode()
    data = sum(spec.bytes for spec in _SPECS)

    def try_one(source: Any) -> None:
        raw = source.ConsumeIntInRange(0, 7) == 7
        size = data + source.PickValueInList([0, 0, 0, 1, -1, 8])
        text = source.ConsumeBytes(_LONGEST) if raw else spoiled(source, sound)
        tensors = parse_header(text, 8 + len(text) + size, "file")
        held = [math.prod(t.shape) * STORED_ITEMSIZE[t.dtype] for t in tensors.values()]
        assert [t.end - t.start for t in tensors.values()] == held and sum(held) == size
        assert all(name.isprintable() and "/" not in name for name in tensors)

    return try_one


def index_target() -> Target:
    """Bytes of an index, before the tensors of two files."""
    tensors: dict[str, Stored] = {}
    for number, spec in enumerate(_SPECS):
        file = f"model-0000{1 + number // 2}-of-00002.safetensors"
        tensors[spec.name] = Stored(file, spec.dtype, spec.shape, 8, 8 + spec.bytes)
    total = sum(spec.bytes for spec in _SPECS)
    places = {name: stored.file for name, stored in tensors.items()}
    sound = json.dumps({"metadata": {"total_size": total}, "weight_map": places})

    def try_one(source: Any) -> None:
        raw = source.ConsumeIntInRange(0, 7) == 7
        text = source.ConsumeBytes(_LONGEST) if raw else spoiled(source, sound)
        found, said = parse_index(text)
        assert not any(c in file for file in found.values() for c in "/\\\0:")
        check_index(found, said, tensors)
        assert found == places and said in (None, total)

    return try_one


def elastic_target() -> Target:
    """The value of `elastic_config`, before a tiny parent of every kind of layer."""
    config = configs.read_config(_CONFIG)
    layout = Layout(config, [3, 1, 0, 2])
    sound = ElasticSpace.of(layout, _SIZES, trained=True).model_dump_json()

    def try_one(source: Any) -> None:
        layout, space = read_declaration(config, json.loads(spoiled(source, sound)))
        for size in space.sizes.values():
            assert size.total_params <= layout.count()
            assert size.total_params == layout.count(layout.sizes_of(size.config))

    return try_one


def guarded(target: Target) -> Callable[[bytes], None]:
    """A target that fails on what an input must not do."""

    def try_bytes(data: bytes) -> None:
        start = time.process_time()
        try:
            target(atheris.FuzzedDataProvider(data))
        except RecursionError:
            raise
        except ValueError as error:
            assert one_line(error).isprintable()
        taken = time.process_time() - start
        if taken > _SECONDS:
            raise TimeoutError(f"one input took {taken:.1f} s")

    return try_bytes


def main() -> None:
    """Fuzz one target; libFuzzer ends the process, and prints how many inputs ran, and how fast."""
    targets = {"header": header_target, "index": index_target, "elastic": elastic_target}
    parser = argparse.ArgumentParser(prog="bench.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(targets))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs; -1: until it is stopped")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=0, help="at most so many; 0: no limit")
    asked = parser.parse_args()
    flags = {
        "runs": asked.runs,
        "seed": asked.seed,
        "max_total_time": asked.seconds,
        "max_len": _LONGEST,
        "len_control": 0,
        "rss_limit_mb": 2048,
        "print_final_stats": 1,
    }
    argv = [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items())]
    atheris.Setup(argv, guarded(targets[asked.target]()))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
