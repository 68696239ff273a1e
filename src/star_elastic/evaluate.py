"""Quality per size: held-out loss and greedy accuracy, every size on the same weights."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.model import ElasticModel
from star_elastic.records import Record, collate, encode, final_answer, prompt_text
from star_elastic.submodel import ElasticSpace

Quality = dict[str, dict[str, float]]  # {task: {"nll": nats per token, "accuracy": 0..1}}


def evaluate(
    model: ElasticModel,
    records: Sequence[Record],
    max_length: int = 512,
    max_new_tokens: int = 128,
    generate: bool = True,
    on_size: Callable[[str, Quality], None] = lambda name, quality: None,
) -> dict[str, Quality]:
    """Measure every named size of a model in one go, on views of its weights.

    `nll` is the mean loss of completion tokens in nats; `accuracy` the share of problems whose
    greedy answer (after the thinking) is exactly right, only for tasks that have prompts.
    """
    measured = {}
    for name in model.sizes:
        measured[name] = evaluate_size(
            model[name], model.tokenizer, records, max_length, max_new_tokens, generate
        )
        on_size(name, measured[name])
    return measured


@torch.no_grad()
def evaluate_size(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[Record],
    max_length: int = 512,
    max_new_tokens: int = 128,
    generate: bool = True,
) -> Quality:
    """The quality of one stock model, by task; see `evaluate`."""
    quality: Quality = {
        task: {"nll": loss} for task, loss in losses(model, tokenizer, records, max_length).items()
    }
    asked = [record for record in records if record.prompt]
    if generate and asked:
        hits: dict[str, list[bool]] = defaultdict(list)
        for record, text in answers(model, tokenizer, asked, max_new_tokens):
            hits[record.task].append(final_answer(text) == record.answer)
        for task, right in hits.items():
            quality[task]["accuracy"] = sum(right) / len(right)
    return quality


def with_quality(space: ElasticSpace, measured: dict[str, Quality]) -> ElasticSpace:
    """The same declaration with the measured quality of each size filled in."""
    submodels = [
        size.model_copy(update={"quality": measured.get(size.name, size.quality)})
        for size in space.submodels
    ]
    return space.model_copy(update={"submodels": submodels})


def mean(quality: Quality, metric: str = "accuracy") -> float | None:
    """The mean of a metric over the tasks that have it."""
    values = [task[metric] for task in quality.values() if metric in task]
    return sum(values) / len(values) if values else None


def answers(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[Record],
    max_new_tokens: int,
    batch_size: int = 128,
) -> Iterator[tuple[Record, str]]:
    """Greedy completions, in batches of prompts of like length."""
    for rows in _batched(model, tokenizer, records, batch_size):
        inputs = tokenizer(
            [prompt_text(tokenizer, record.prompt) for record in rows],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        generate: Any = model.generate
        output = generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        completions = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        yield from zip(rows, texts, strict=True)


def _batched(
    model: PreTrainedModel, tokenizer: Any, records: Sequence[Record], batch_size: int
) -> Iterator[list[Record]]:
    """Records by length of prompt; only where padding is exact do lengths mix in a batch."""
    texts = [prompt_text(tokenizer, record.prompt) for record in records]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    mixed = stock.pads_exactly(model)
    batch: list[int] = []
    for row in sorted(range(len(records)), key=lengths.__getitem__):
        unlike = batch and not mixed and lengths[row] != lengths[batch[0]]
        if unlike or len(batch) == batch_size:
            yield [records[n] for n in batch]
            batch = []
        batch.append(row)
    if batch:
        yield [records[n] for n in batch]


def losses(
    model: PreTrainedModel, tokenizer: Any, records: Sequence[Record], max_length: int
) -> dict[str, float]:
    """Mean loss per completion token and task, in nats."""
    totals: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    by_length = sorted(records, key=lambda record: len(record.completion))
    for start in range(0, len(by_length), 16):
        rows = by_length[start : start + 16]
        batch = collate(encode(tokenizer, rows, max_length, "completion"), pad=0)
        input_ids = batch.input_ids.to(model.device)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        chosen = logits.float().log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        targets = batch.targets[:, 1:].to(model.device)
        sums, counts = (-chosen * targets).sum(1).tolist(), targets.sum(1).tolist()
        for record, loss, count in zip(rows, sums, counts, strict=True):
            totals[record.task] += loss
            tokens[record.task] += count
    return {task: totals[task] / max(1, tokens[task]) for task in sorted(totals)}
