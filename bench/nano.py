"""Nemotron 3 Nano's shapes on disk, with as many of its layers as asked, for benches of files.

python -m bench.nano FOLDER [--pattern MEME*EME] [--sparse]
"""

import argparse
import os
from pathlib import Path

import numpy as np
from transformers import NemotronHConfig

from star_elastic import configs
from star_elastic.dtypes import STORED_AS, dtype_of
from star_elastic.folder import WEIGHTS, Shards, Spec, write_json
from star_elastic.folder.header import header_bytes
from star_elastic.layout import Layout
from star_elastic.submodel import ElasticSpace, Fields

PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SIZES: dict[str, Fields] = {
    "full": {},
    "medium": {"hidden_size": 2304, "moe_intermediate_size": 1600},
    "small": {"hidden_size": 1920, "moe_intermediate_size": 960},
}
_BLOCK = 2**24
_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe"}


def nano_config(
    pattern: str = PATTERN, experts: int = 128, dtype: str = "bfloat16"
) -> NemotronHConfig:
    """Nemotron 3 Nano 30B-A3B, or fewer of its layers and experts."""
    return NemotronHConfig(
        layers_block_type=[_KINDS[letter] for letter in pattern],
        vocab_size=131072,
        hidden_size=2688,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        conv_kernel=4,
        n_routed_experts=experts,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        tie_word_embeddings=False,
        dtype=dtype,
    )


def write_parent(folder: Path, pattern: str = PATTERN, sparse: bool = False) -> Layout:
    """A parent of random weights, or of none at all (a sparse file), that declares three sizes."""
    layout = Layout(nano_config(pattern))
    dtype = STORED_AS[dtype_of(layout.config)]
    specs = [Spec(name, dtype, w.shape(layout.sizes)) for name, w in layout.stored.items()]
    folder.mkdir(parents=True)
    if sparse:
        _write_holes(folder, specs)
    else:
        noise = np.random.default_rng(0)
        with Shards(folder, specs) as shards:
            for spec in specs:
                for start in range(0, spec.bytes, _BLOCK):
                    count = min(_BLOCK, spec.bytes - start) // 2
                    values = noise.standard_normal(count, np.float32) / 50
                    high = values.view(np.uint16)[1::2]  # bfloat16 is the upper half of float32
                    shards.write(np.ascontiguousarray(high).view(np.uint8).data)
    values = configs.config_json(layout.config)
    values["elastic_config"] = ElasticSpace.of(layout, SIZES, trained=True).model_dump()
    write_json(folder / "config.json", values)
    os.sync()
    return layout


def _write_holes(folder: Path, specs: list[Spec]) -> None:
    """One file that is all header: the rest is never written, and reads as zeros."""
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header_bytes(specs))
        file.truncate(file.tell() + sum(spec.bytes for spec in specs))


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pattern", default=PATTERN)
    parser.add_argument("--sparse", action="store_true")
    arguments = parser.parse_args()
    write_parent(arguments.folder, arguments.pattern, arguments.sparse)


if __name__ == "__main__":
    main()
