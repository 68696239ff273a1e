"""Tokenizers in GGUF files: read back as they were, or refused by file and field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_level import KINDS, TEMPLATE, TOKENS, tokenizer
from folders import edit_json
from gguf_files import checkpoint, export, fields
from models import letters_tokenizer

from star_elastic.folder import CheckpointError


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_tokenizers(kind: str, tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e", "qwen3")
    stock = tokenizer(kind)
    stock.save_pretrained(tmp_path / "e")
    (tmp_path / "e" / "generation_config.json").write_text('{"eos_token_id": [4, 2, 1]}')
    said = fields(export(opened, tmp_path / "f.gguf").path)
    tokens = said["tokenizer.ggml.tokens"]
    assert tokens == [*stock.convert_ids_to_tokens(range(TOKENS))] + [
        f"[PAD{n}]" for n in range(TOKENS, TOKENS + 8)
    ]
    assert said["tokenizer.ggml.token_type"] == [3] * 5 + [1] * (TOKENS - 5) + [5] * 8
    core = json.loads(stock.backend_tokenizer.to_str())["model"]
    assert said["tokenizer.ggml.merges"] == [" ".join(pair) for pair in core["merges"]]
    assert said["tokenizer.chat_template"] == TEMPLATE
    assert said["tokenizer.ggml.add_bos_token"] is False
    named = {n: said[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos", "padding", "eot")}
    assert named == {"bos": 1, "eos": 2, "padding": 0, "eot": 4}
    pre = {"gpt2": "trillion", "digits": "command-r", "llama3": "llama-bpe", "gpt4o": "gpt-4o"}
    pre |= {"llama3-merging": "smaug-bpe"}
    assert said["tokenizer.ggml.pre"] == pre.get(kind, kind)


def test_a_beginning_that_is_added(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e", "qwen3")
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
    }
    edit_json(tmp_path / "e" / "tokenizer.json", lambda t: t.update(post_processor=template))
    said = fields(export(opened, tmp_path / "f.gguf").path)
    assert said["tokenizer.ggml.add_bos_token"] and not said["tokenizer.ggml.add_eos_token"]
    template["single"][0]["SpecialToken"]["id"] = "<turn>"
    edit_json(tmp_path / "e" / "tokenizer.json", lambda t: t.update(post_processor=template))
    with pytest.raises(CheckpointError, match="tokenizer.json: post_processor adds '<turn>' first"):
        export(opened, tmp_path / "g.gguf")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t["model"].update(byte_fallback=True), "SentencePiece-like BPE"),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer is not byte"),
        (lambda t: t["pre_tokenizer"].update(pretokenizers=[]), "pre_tokenizer is not byte"),
        (lambda t: t["added_tokens"][0].update(lstrip=True), "'<pad>' has lstrip"),
        (lambda t: t["added_tokens"][0].update(id=10**6), "token id 1000000, but config.json"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"}), "cuts text"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, {
            "type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"}), "cuts text"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, {
            "type": "Punctuation", "behavior": "Isolated"}), "cuts text"),
        (lambda t: t.pop("model"), "not understood"),
    ],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_has_not(
    change: Callable[[Any], Any], complaint: str, tmp_path: Path
) -> None:
    opened = checkpoint(tmp_path / "e", "qwen3")
    edit_json(tmp_path / "e" / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=f"tokenizer.json: .*{complaint}"):
        export(opened, tmp_path / "f.gguf")


def test_no_tokenizer_and_another_kind_of_one(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e", "qwen3")
    letters_tokenizer().save_pretrained(tmp_path / "e")
    with pytest.raises(CheckpointError, match="tokenizer.json: model.type is WordLevel"):
        export(opened, tmp_path / "f.gguf")
    (tmp_path / "e" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json: not there.*--no-tokenizer"):
        export(opened, tmp_path / "f.gguf")
    said = fields(export(opened, tmp_path / "f.gguf", with_tokenizer=False).path)
    assert said["tokenizer.ggml.model"] == "none" and said["qwen3.vocab_size"] == TOKENS + 8


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "e", "qwen3")
    edit_json(tmp_path / "e" / "tokenizer_config.json", lambda t: t.pop("eos_token"))
    with pytest.raises(CheckpointError, match="tokenizer_config.json: no eos_token"):
        export(opened, tmp_path / "f.gguf")
