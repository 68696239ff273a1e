"""Byte-level BPE tokenizers made on the spot, one for every way to cut text that GGUF can tell."""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TOKENS = 340
_CORPUS = [
    "The answer is 42, isn't it? ABCdef camelCase HTTPServer",
    "naïve café — 東京 😀 übergrößeÄÖ",
    "def f(x):\n    return x + 1\n\n\n",
] * 8
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FIRST = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_SECOND = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
# as published: Qwen 2, Llama 3, Mistral's tekken, GPT-4o
PATTERNS = {
    "qwen2": rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}",
    "llama3": rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "llama3-merging": rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "tekken": rf"{_FIRST}|{_SECOND}|\p{{N}}|{_SLASHED}",
    "gpt4o": rf"{_FIRST}{_ENDINGS}?|{_SECOND}{_ENDINGS}?|\p{{N}}{{1,3}}|{_SLASHED}",
}
KINDS = ["gpt2", "digits", *PATTERNS]
TEMPLATE = "{% for m in messages %}<turn>{{ m['content'] }}</turn>{% endfor %}"


def tokenizer(kind: str = "gpt2") -> PreTrainedTokenizerFast:
    """A tokenizer with an end, a turn and a template; `kind` says how text is cut."""
    core = Tokenizer(models.BPE(ignore_merges=kind in ("llama3", "tekken")))
    core.pre_tokenizer = pre_tokenizers.Sequence(_steps(kind))  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<pad>", "<s>", "</s>", "<turn>", "</turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def _steps(kind: str) -> list[Any]:
    if kind in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[kind]), "isolated")
        return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == "digits" else []
    return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
