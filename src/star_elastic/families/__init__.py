"""One table per `model_type`, and nothing else. A new family is a new table."""

from star_elastic.families.dense import LLAMA, QWEN2, QWEN3, QWEN3_MOE
from star_elastic.families.family import Family, Probe
from star_elastic.families.nemotron_h import NEMOTRON_H

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (NEMOTRON_H, LLAMA, QWEN2, QWEN3, QWEN3_MOE)
}

__all__ = ["FAMILIES", "Family", "Probe"]
