"""What an engine has to do, and what it has done."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SizeStats:
    """Of one size: its sequences now, and its tokens since it came up."""

    queued: int
    running: int
    prompt_tokens_computed: int  # again after a preemption, too
    prompt_tokens_reused: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Of all sizes together. Read beside a step, its numbers may be a token apart."""

    queued: int
    running: int
    cache_used: float  # share of blocks in use, of the most pressed pool
    preemptions: int
    steps: int
    sizes: Mapping[str, SizeStats]
