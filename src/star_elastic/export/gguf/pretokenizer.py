"""Which of llama.cpp's pre-tokenizers cuts text as a `tokenizer.json` does.

llama.cpp has a fixed list, by name, of patterns written in C++ (`src/llama-vocab.cpp`). A name is
given here only where the same text gives the same tokens, but for two (`_ASCII_CASE`). Names also
switch things on: `llama-bpe` and `tekken` look whole words up before they merge, and of names with
the same pattern those that leave spaces alone when they decode are taken.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str) -> str:
    """Words that a capital after a small letter ends."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"


# (pattern, does the model look whole words up first) -> name
_PATTERNS = {
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}", True): "llama-bpe",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}", False): "smaug-bpe",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_SYMBOLS}", False): "qwen2",
    (rf"{_cased('')}|\p{{N}}|{_SLASHED}", True): "tekken",
    (rf"{_cased(_ENDINGS + '?')}|\p{{N}}{{1,3}}|{_SLASHED}", False): "gpt-4o",
}
# Their patterns tell capitals from small letters; llama.cpp can in ASCII only, and not tell marks.
_ASCII_CASE = ("tekken", "gpt-4o")
_LETTERS = re.compile("\u0120?[A-Za-z]+")  # the byte-level alphabet writes a space as U+0120
_HUMP = re.compile("[a-z][A-Z]")


def pretokenizer_of(values: Mapping[str, Any]) -> tuple[str, bool]:
    """The name of llama.cpp's pre-tokenizer for a `tokenizer.json`; does it cut all text alike?

    Raises:
        ValueError: not a byte-level one, or none of llama.cpp's cuts text alike.
    """
    model, steps = values["model"], _steps(values.get("pre_tokenizer"))
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise ValueError("pre_tokenizer is not byte-level; llama.cpp's BPE is")
    *before, last = steps
    if last.get("add_prefix_space"):
        raise ValueError("pre_tokenizer.add_prefix_space = true: llama.cpp adds none")
    whole_words = bool(model.get("ignore_merges"))
    kinds = [_kind(step) for step in before]
    if not last.get("use_regex", True):
        if len(before) == 1 and (name := _PATTERNS.get((_pattern(before[0]), whole_words))):
            return name, name not in _ASCII_CASE
    elif not kinds and not whole_words:
        return "trillion", True  # GPT-2's pattern
    elif kinds == ["digits"] and not whole_words:
        return "command-r", True  # digits one by one, then GPT-2's pattern
    elif "punctuation" in kinds and {*kinds} <= {"digits", "punctuation"} and _plain_words(values):
        return "tekken", True  # its cuts by case meet no word
    raise ValueError("pre_tokenizer: none of llama.cpp's cuts text as this one does")


def _steps(declared: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if declared is None:
        return []
    return declared["pretokenizers"] if declared.get("type") == "Sequence" else [declared]


def _kind(step: Mapping[str, Any]) -> str:
    """What a step in front of the byte level does, if it is one that we know."""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    if step.get("type") == "Punctuation" and step.get("behavior") == "Isolated":
        return "punctuation"
    return ""


def _pattern(step: Mapping[str, Any]) -> str:
    """The pattern whose matches stay together; two spellings mean that."""
    isolates = step.get("behavior") == "Isolated" and not step.get("invert")
    removes = step.get("behavior") == "Removed" and step.get("invert")
    if step.get("type") != "Split" or not (isolates or removes):
        return ""
    return str(step["pattern"].get("Regex", ""))


def _plain_words(values: Mapping[str, Any]) -> bool:
    """Do merges make nothing but words of ASCII letters, at most one space before them?

    Then only cuts inside such a word can change tokens. Punctuation, digits and GPT-2's pattern
    (whose endings need an apostrophe) never cut there; `tekken` cuts between a small letter and a
    capital only, and looks words up first, which must find what merging them would.
    """
    merges = [_pair(merge) for merge in values["model"]["merges"]]
    added = {token["content"] for token in values.get("added_tokens", [])}
    made = {token for token in values["model"]["vocab"] if len(token) > 1} - added
    if not all(_LETTERS.fullmatch(token) and not _HUMP.search(token) for token in made):
        return False
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return all(_merged(token, ranks) == [token] for token in made)


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _merged(text: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Byte-pair merging: the best-ranked pair first, its leftmost occurrence first."""
    parts = list(text)
    while pairs := [(ranks[p], n) for n, p in enumerate(pairwise(parts)) if p in ranks]:
        _, n = min(pairs)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts
