"""A folder's tokenizer as GGUF keys: byte-level BPE, its special tokens, and the chat template.

What llama.cpp would silently do otherwise is refused by file and field. One thing it does not do is
known and let pass, as its own converter does: Unicode normalization (NFC) before tokens are found.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from star_elastic.export.gguf.pretokenizer import pretokenizer_of
from star_elastic.folder import CheckpointError, read_bytes, read_json

_FILE, _CONFIG, _GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_MAX_TOKENIZER = 2**28  # bytes; the largest published ones have 2**25
_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as GGUF spells them
_NAMED = ("bos", "eos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer; without `tokens`, a file that takes and gives ids only."""

    pre: str = ""
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: Mapping[str, int] = field(default_factory=dict)  # bos, eos, ... -> id
    adds_bos: bool = False
    adds_eos: bool = False
    chat_template: str | None = None
    cuts_alike: bool = True  # else llama.cpp tells case in ASCII only, and no combining marks


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a folder.

    Raises:
        CheckpointError: there is none, or llama.cpp cannot express it; names file and field.
    """
    path = folder / _FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: not there, and llama.cpp wants a tokenizer; --no-tokenizer writes a file "
            "that takes and gives token ids only"
        )
    values = read_json(path, _MAX_TOKENIZER)
    declared = _optional(folder / _CONFIG)
    try:
        pre, cuts_alike = _check(values)
        tokens, types = _tokens(values, vocab_size)
        first, last = _ends(values.get("post_processor"))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = error if isinstance(error, ValueError) else f"not understood ({error!r})"
        raise CheckpointError(f"{path}: {reason}") from None
    ids = {token: number for number, token in enumerate(tokens)}
    special = _special(folder, declared, ids, first)
    for place, token, name in (("first", first, "bos"), ("last", last, "eos")):
        if token is not None and ids.get(token) != special.get(name):
            raise CheckpointError(
                f"{path}: post_processor adds {token!r} {place}, not {name}_token"
            )
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[_merge(each) for each in values["model"]["merges"]],
        special=special,
        adds_bos=first is not None,
        adds_eos=last is not None,
        chat_template=_chat_template(folder, declared),
        cuts_alike=cuts_alike,
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write all keys of `tokenizer.ggml` and the chat template."""
    if not vocabulary.tokens:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id", number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _check(values: Mapping[str, Any]) -> tuple[str, bool]:
    """Hold a `tokenizer.json` against what llama.cpp does; see `pretokenizer_of`."""
    model, normalizer = values["model"], values.get("normalizer") or {}
    kind = model.get("type", "BPE")
    if kind != "BPE" or model.get("byte_fallback"):
        what = "SentencePiece-like BPE" if kind == "BPE" else kind
        raise ValueError(f"model.type is {what}; only byte-level BPE can be written")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise ValueError(f"model.{name} = {model[name]!r}: llama.cpp has none")
    inner = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if strange := [each["type"] for each in inner if each["type"] != "NFC"]:
        raise ValueError(f"normalizer {strange[0]}: llama.cpp has none")
    for token in values.get("added_tokens", []):
        if flag := next((f for f in ("single_word", "lstrip", "rstrip") if token.get(f)), None):
            raise ValueError(f"added_tokens: {token['content']!r} has {flag}: llama.cpp has not")
    return pretokenizer_of(values)


def _tokens(values: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that the embedding has and the tokenizer has not, too."""
    known = {number: token for token, number in values["model"]["vocab"].items()}
    types = dict.fromkeys(known, TokenType.NORMAL)
    for token in values.get("added_tokens", []):
        known[token["id"]] = token["content"]
        special = token.get("special")
        types[token["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    if (most := max(known)) >= vocab_size:
        raise ValueError(f"token id {most}, but config.json has vocab_size = {vocab_size}")
    tokens = [known.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    if len({*tokens}) != vocab_size:
        raise ValueError("one token has two ids")
    return tokens, [int(types.get(number, TokenType.UNUSED)) for number in range(vocab_size)]


def _merge(merge: Any) -> str:
    """A merge as GGUF has it: byte-level tokens hold no space."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _ends(processor: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """The tokens that go before and after every text."""
    several = (processor or {}).get("processors", [processor] if processor else [])
    first, last = None, None
    for each in several:
        if each["type"] == "ByteLevel":
            continue
        if each["type"] != "TemplateProcessing":
            raise ValueError(f"post_processor {each['type']}: llama.cpp has none")
        found = [piece.get("SpecialToken", {}).get("id") for piece in each["single"]]
        text = found.index(None)
        before, after = found[:text], found[text + 1 :]
        if len(before) > 1 or len(after) > 1:
            raise ValueError("post_processor adds more than one token at an end")
        first, last = next(iter(before), first), next(iter(after), last)
    return first, last


def _special(
    folder: Path, declared: Mapping[str, Any], ids: Mapping[str, int], first: str | None
) -> dict[str, int]:
    """Named tokens; what else ends a generation is the end of a turn and of a message."""
    said = {name: _content(declared.get(f"{name}_token")) for name in _NAMED}
    said["bos"] = said["bos"] or first
    found = {name: ids[token] for name, token in said.items() if token is not None and token in ids}
    ends = _optional(folder / _GENERATION).get("eos_token_id")
    several = ends if isinstance(ends, list) else [ends] if ends is not None else []
    several = [end for end in several if isinstance(end, int) and 0 <= end < len(ids)]
    if "eos" not in found and not several:
        raise CheckpointError(
            f"{folder / _CONFIG}: no eos_token: llama.cpp would take token 11 for the end"
        )
    found.setdefault("eos", several[0] if several else 0)
    others = [end for end in several if end != found["eos"]]
    return found | dict(zip(("eot", "eom"), others, strict=False))


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(folder: Path, declared: Mapping[str, Any]) -> str | None:
    if (folder / _TEMPLATE).is_file():
        return read_bytes(folder, _TEMPLATE).decode("utf-8", "replace")
    said = declared.get("chat_template")
    if isinstance(said, list):  # several, by name
        said = next((each["template"] for each in said if each["name"] == "default"), None)
    return said
