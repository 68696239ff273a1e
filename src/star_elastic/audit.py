"""Is a checkpoint elastic at all? What each size keeps of what the parent knows.

The scale has two ends, both on the same text: the parent's loss, and the loss of a model that knows
how frequent each token of that very text is and nothing else (its unigram entropy). A checkpoint
that was reordered and never trained loses most of the way at its smaller sizes.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from star_elastic.evaluate import losses
from star_elastic.model import ElasticModel
from star_elastic.records import Record, encode
from star_elastic.submodel import Submodel

KEEPS = 0.95  # at demo scale trained sizes kept 100 %, merely sorted ones 90 % and 11 %


@dataclass(frozen=True)
class Finding:
    """One size: its loss in nats per token, and the share it keeps of the parent's knowledge.

    1 is as good as the parent, 0 no better than token frequencies; it may leave both ends.
    """

    size: Submodel
    loss: float
    kept: float

    @property
    def warning(self) -> str:
        """What to say of it; nothing of a size that is as trained as it claims."""
        share = f"keeps {100 * self.kept:.0f} % of what the parent knows"
        if self.kept < KEEPS:
            claim = "though it is declared trained" if self.size.trained else "never trained"
            return f"not elastic at this size: {share}, {claim}"
        return "" if self.size.trained else f"never trained, and yet it {share}"


@torch.no_grad()
def audit(
    model: ElasticModel,
    records: Sequence[Record],
    max_length: int = 512,
    on_size: Callable[[str], None] = lambda name: None,
) -> list[Finding]:
    """Measure every declared size on the same text.

    Raises:
        ValueError: no token to predict in the records, or a parent no better than frequencies.
    """
    sample = [replace(record, task="audit") for record in records]
    floor = unigram_entropy(model.tokenizer, sample, max_length)
    found = {}
    for name in model.sizes:
        found[name] = losses(model[name], model.tokenizer, sample, max_length)["audit"]
        on_size(name)
    whole = losses(model.parent, model.tokenizer, sample, max_length)["audit"]
    if not whole < floor:
        raise ValueError(
            f"audit: the parent's loss, {whole:.3f} nats, is no better than token frequencies "
            f"({floor:.3f}): it does not know this kind of text"
        )
    return [
        Finding(size, found[name], 1 - (found[name] - whole) / (floor - whole))
        for name, size in model.sizes.items()
    ]


def unigram_entropy(tokenizer: Any, records: Sequence[Record], max_length: int) -> float:
    """Nats per token of a model that knows the frequencies of these very tokens.

    Raises:
        ValueError: no completion token within `max_length`.
    """
    counts: Counter[int] = Counter()
    for example in encode(tokenizer, records, max_length, "completion"):
        for start, end in example.spans:
            counts.update(example.ids[start:end])
    total = counts.total()
    if not total:
        raise ValueError(f"audit: no token to predict within {max_length} tokens")
    return -sum(n / total * math.log(n / total) for n in counts.values())
