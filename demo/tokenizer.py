"""Build the small byte-level tokenizer that the demonstration's models use."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' }}{% else %}{{ '<|assistant|>' }}{% endif %}"
    "{{ message['content'] }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE in which every digit and punctuation mark stands alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = re.compile(f"{re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)}")
    tokenizer.train_from_iterator((marks.split(text) for text in texts), trainer)
    return tokenizer


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on ``texts`` with at most ``vocab_size`` entries.

    All 256 bytes are in the alphabet, so any text is encoded without loss; ``vocab_size`` must
    leave room for them and for the six added tokens. Padding has the id 0. The thinking marks are
    single tokens that are not special: they stay in the text when special tokens are skipped.
    """
    if vocab_size < 262:
        raise ValueError(f"vocab_size must be at least 262, not {vocab_size}")
    bpe = _train_bpe(texts, vocab_size - 2)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    marks: list[str | AddedToken] = [
        AddedToken(mark, special=False, normalized=False) for mark in (THINK_OPEN, THINK_CLOSE)
    ]
    tokenizer.add_tokens(marks)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
