"""A checkpoint in this process as one to talk to."""

from typing import Any

import torch
from transformers import TextStreamer

from star_elastic.cli.talk import Account, Hear, Messages
from star_elastic.model import ElasticModel
from star_elastic.serve.text import Parts, Reasoning

_MAX_TOKENS = 256  # of an answer, unless the user says otherwise
_THINK = ("<think>", "</think>")


class OfCheckpoint:
    """A checkpoint on views of its one copy of weights, answering greedily."""

    chooses = False

    def __init__(self, checkpoint: str, bits: int | None, max_tokens: int | None) -> None:
        """Raises: ValueError: no checkpoint, or one without a tokenizer."""
        self._model = ElasticModel.from_pretrained(checkpoint, bits=bits)
        self._max_tokens = max_tokens or _MAX_TOKENS
        if self._model.tokenizer is None:
            raise ValueError(f"{checkpoint}: no tokenizer_config.json; chat needs a tokenizer")

    @property
    def sizes(self) -> list[str]:
        """Of the checkpoint, the largest first."""
        return list(self._model.sizes)

    def answer(self, messages: Messages, size: str | None, hear: Hear) -> Account:
        """As `Partner.answer`."""
        assert size is not None, "nobody here chooses"
        tokenizer, text = self._model.tokenizer, self._prompt(messages)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        account = Account([size])
        streamer = _Streamer(tokenizer, text, account, hear)
        generate: Any = self._model[size].generate
        generate(
            input_ids=inputs["input_ids"].to(self._model.parent.device),
            attention_mask=inputs["attention_mask"].to(self._model.parent.device),
            streamer=streamer,
            max_new_tokens=self._max_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        account.cut = account.tokens >= self._max_tokens
        return account

    def close(self) -> None:
        pass

    def _prompt(self, messages: Messages) -> str:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template is None:
            return messages[-1]["content"]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class _Streamer(TextStreamer):
    """Text of `generate` as it comes, the reasoning told apart where a model thinks."""

    def __init__(self, tokenizer: Any, prompt: str, account: Account, hear: Hear) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._account, self._hear = account, hear
        known = str(tokenizer.chat_template) + "".join(tokenizer.get_added_vocab())
        inside = prompt.rstrip().endswith(_THINK[0])
        self._reasoning = Reasoning(*_THINK, inside) if _THINK[1] in known else None
        marks = set(tokenizer.convert_tokens_to_ids(list(_THINK)))
        self._hidden = set(tokenizer.all_special_ids) - marks

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, and then with every token."""
        if self.next_tokens_are_prompt:
            return super().put(value)
        self._account.note()
        self._account.tokens += value.numel()
        shown = [token for token in value.flatten().tolist() if token not in self._hidden]
        if shown:
            super().put(torch.tensor(shown))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with every piece that is sure."""
        if self._reasoning is None:
            return self._hear(Parts(content=text))
        parts = self._reasoning.push(text)
        self._hear(parts + self._reasoning.finish() if stream_end else parts)
