"""From a checkpoint on disk to a service: the model, its engine, its tokenizer and template."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel, load_tokenizer
from star_elastic.serve.answers import Backend
from star_elastic.serve.engine import Engine
from star_elastic.serve.forcing import Marks
from star_elastic.serve.keys import Keys
from star_elastic.serve.local import Local, Speech
from star_elastic.serve.policy import Load, Size
from star_elastic.serve.prompts import Prompts
from star_elastic.serve.sampling import Sampling
from star_elastic.serve.schema import Limits
from star_elastic.serve.service import Service
from star_elastic.serve.settings import Settings
from star_elastic.serve.sizes import Sizes
from star_elastic.serve.status import Memory
from star_elastic.serve.template import ChatTemplate
from star_elastic.serve.text import pieces
from star_elastic.serve.upstream import Upstreams
from star_elastic.serve.worker import Worker
from star_elastic.submodel import Submodel

_THINK = ("<think>", "</think>")
_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Capacity:
    """What the engine may take; see `Engine`."""

    slots: int = 16
    max_length: int = 4096
    cache_tokens: int | None = None
    step_tokens: int = 512

    def engine(self, model: ElasticModel, longest: int, sizes: Sequence[str] | None) -> Engine:
        """An engine for the named sizes of a model (all if None), and prompts and answers so long.

        Raises:
            ValueError: see `Engine`.
        """
        return Engine(model, self.slots, longest, self.cache_tokens, self.step_tokens, sizes=sizes)


@dataclass(frozen=True)
class Source:
    """What of a checkpoint a server needs besides its weights."""

    where: str
    tokenizer: Any
    config: Any
    generation: Any
    sizes: Mapping[str, Submodel]

    @classmethod
    def of_model(cls, model: ElasticModel) -> "Source":
        """Of a model in memory."""
        parent = model.parent
        where = str(model.source)
        return cls(where, model.tokenizer, parent.config, parent.generation_config, model.sizes)

    @classmethod
    def of_checkpoint(cls, opened: Checkpoint) -> "Source":
        """Of a folder whose weights others have in memory."""
        generation = None
        if (opened.path / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(opened.path)
        tokenizer = load_tokenizer(opened.path)
        return cls(str(opened.path), tokenizer, opened.config, generation, opened.space.sizes)


@dataclass
class Opened:
    """A service, and all that runs for it: use it with `async with`, or `close` it."""

    service: Service
    template: ChatTemplate | None
    model: ElasticModel | None = None
    worker: Worker | None = None
    sizes: Sizes | None = None  # those of the engine here
    upstreams: Upstreams | None = None
    weights: Memory = Memory()
    watching: asyncio.Task[None] | None = None

    def memory(self) -> Memory:
        """Bytes of weights and caches here."""
        if self.worker is None:
            return self.weights
        return replace(self.weights, cache=self.worker.engine.cache_bytes)

    async def __aenter__(self) -> "Opened":
        if self.upstreams is not None:
            await self.upstreams.start()
        self.watching = asyncio.create_task(self.service.watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.watching is not None:
            self.watching.cancel()
            await asyncio.gather(self.watching, return_exceptions=True)
        if self.upstreams is not None:
            await self.upstreams.close()

    def close(self) -> None:
        """End the engine's thread and the template's processes."""
        if self.worker is not None:
            self.worker.stop()
        if self.template is not None:
            self.template.close()


def open_service(
    source: ElasticModel | Checkpoint,
    name: str,
    capacity: Capacity | None = None,
    settings: Settings | None = None,
    sizes: Sequence[str] | None = None,
    keys: Keys | None = None,
    upstreams: Upstreams | None = None,
) -> Opened:
    """Serve sizes of a model from its one copy of the weights, and others from servers elsewhere.

    Args:
        source: a checkpoint instead of a model serves nothing itself.
        name: the model's id.
        sizes: those that the engine here serves; all if None.

    Raises:
        ValueError: no tokenizer, or one that cannot be streamed; a size that is not there; numbers
            that leave no room to work in; see `Engine`.
    """
    model = source if isinstance(source, ElasticModel) else None
    known = Source.of_model(source) if model else Source.of_checkpoint(source)  # type: ignore[arg-type]
    if known.tokenizer is None:
        raise ValueError(f"{known.where}: no tokenizer_config.json; a server needs a tokenizer")
    speech = speech_of(known)
    capacity = capacity or Capacity()
    longest = min(capacity.max_length, known.config.max_position_embeddings)
    backends: dict[str, Backend] = {}
    worker = local = None
    if model is not None:
        worker = Worker(capacity.engine(model, longest, sizes))
        local = Local(worker, speech)
        backends = dict.fromkeys(worker.engine.sizes, local)
    for size in upstreams.sizes if upstreams else ():
        if size not in known.sizes:
            names = ", ".join(known.sizes)
            raise ValueError(f"upstream {size}: {known.where} has no such size, but {names}")
        backends[size] = upstreams.of(size)  # type: ignore[union-attr]
    template = ChatTemplate.of(known.tokenizer)
    service = Service(
        name,
        [Size(size, known.sizes[size].active_params) for size in backends],
        backends,
        Prompts(known.tokenizer, template, speech.marks),
        Limits(longest, known.config.get_text_config().vocab_size),
        lambda: _together([each.load() for each in (worker, upstreams) if each is not None]),
        settings,
        keys,
        thinks=speech.marks is not None,
    )
    opened = Opened(service, template, model, worker, upstreams=upstreams)
    _check_device(service)
    if worker is not None and local is not None and model is not None:
        opened.sizes = Sizes(service, local, model.layout, model.sizes)
        opened.weights = _weights(model, worker.engine.sizes)
        worker.start()
    return opened


def speech_of(source: Source) -> Speech:
    """How the tokens of a checkpoint become text, and what it says of sampling.

    Raises:
        ValueError: a tokenizer that cannot be streamed.
    """
    tokenizer = source.tokenizer
    ends = getattr(source.generation, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else ends or []
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    marks = _marks(tokenizer)
    return Speech(
        pieces(tokenizer.backend_tokenizer, keep=_THINK if marks else ()),
        frozenset([*ends, *own]),
        marks,
        _defaults(source.generation),
    )


def _check_device(service: Service) -> None:
    """Raises: ValueError: a policy wants to know of a GPU that tells nothing."""
    wanted = service.settings.load and service.settings.load.device
    if wanted is not None and service.load().device_used is None:
        raise ValueError(
            f"policy load.device {wanted}: no GPU tells its utilization (is nvidia-ml-py there?)"
        )


def _weights(model: ElasticModel, sizes: Sequence[str]) -> Memory:
    copies = sum(model.copied_bytes(model[size]) for size in sizes)
    return Memory(sum(tensor.nbytes for tensor in model.state.values()), copies)


def _together(loads: Sequence[Load]) -> Load:
    devices = [load.device_used for load in loads if load.device_used is not None]
    return Load(
        sum(load.queued for load in loads),
        sum(load.running for load in loads),
        sum(load.tokens_per_second for load in loads),
        max(load.cache_used for load in loads),
        max(devices, default=None),
    )


def _marks(tokenizer: Any) -> Marks | None:
    """A model thinks if its template or its vocabulary has the marks."""
    start, end = _THINK
    where = f"{list(tokenizer.get_added_vocab())} {tokenizer.chat_template}"
    if start not in where and end not in where:
        return None
    core = tokenizer.backend_tokenizer
    return Marks(start, end, lambda text: core.encode(text, add_special_tokens=False).ids)


def _defaults(generation: Any) -> Sampling:
    """As vLLM: what the checkpoint's generation config says, else OpenAI's defaults."""
    said = {name: getattr(generation, name, None) for name in _SAMPLED}
    known = {name: value for name, value in said.items() if value is not None}
    return Sampling(**{"temperature": 1.0, **known})
