"""What an operator decides: which policies choose, and how much a model may think. One YAML file.

load: {queue: 8, cache: 0.9}          # smaller sizes under pressure (on by default)
latency: {ttft_ms: 500, tpot_ms: 40}  # for every request
cost: {per_minute: 1e6, prices: {small: 0.5}}
quality: {high: full, routine: small} # names of qualities, and tiers of API keys
cascade: {below: 0.8}                 # small first, larger ones where it is not sure
overload: {queue: 256}
thinking: {default: -1, efforts: {low: 1024}}
"""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from star_elastic.folder import CheckpointError
from star_elastic.serve.schema.thinking import UNLIMITED, Effort
from star_elastic.submodel import Strict

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class LoadSettings(Strict):
    """See `ByLoad`."""

    queue: Count = 8
    cache: Share = 0.9
    device: Share | None = None
    ease: Annotated[float, Field(ge=0, lt=1)] = 0.5
    tick_s: Positive = 0.25
    down_ticks: Count = 2
    up_ticks: Count = 20


class LatencySettings(Strict):
    """Targets for every request, in milliseconds; see `ByLatency`."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    margin: Share = 0.9


class CostSettings(Strict):
    """The server's budget per minute, and prices per token; see `Size.price`."""

    per_minute: Positive | None = None
    prices: dict[str, Annotated[float, Field(ge=0)]] = {}


class CascadeSettings(Strict):
    below: Annotated[float, Field(gt=0, lt=1)]


class DifficultySettings(Strict):
    """A file of `star-elastic route fit`, and the share of the largest size's cost to spend."""

    file: str = Field(min_length=1)
    share: Share


class OverloadSettings(Strict):
    """See `Full`."""

    queue: Count = 256
    cache: Share = 1.0
    tokens_per_request: Count = 256


class ThinkingSettings(Strict):
    """Tokens by `reasoning_effort`; -1 is no limit."""

    default: Annotated[int, Field(ge=UNLIMITED)] = UNLIMITED
    min_answer_tokens: Annotated[int, Field(ge=0)] = 16
    efforts: dict[Effort, Annotated[int, Field(ge=UNLIMITED)]] = {
        "none": 0,
        "minimal": 512,
        "low": 1024,
        "medium": 4096,
        "high": 16384,
        "xhigh": 32768,
        "max": UNLIMITED,
    }


class Settings(Strict):
    """The whole file; what is absent is off, but for load, overload and thinking."""

    load: LoadSettings | None = LoadSettings()
    latency: LatencySettings = LatencySettings()
    cost: CostSettings = CostSettings()
    quality: dict[str, str] = {}
    difficulty: DifficultySettings | None = None
    cascade: CascadeSettings | None = None
    overload: OverloadSettings = OverloadSettings()
    thinking: ThinkingSettings = ThinkingSettings()

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """The file's settings.

        Raises:
            CheckpointError: naming file, field and value.
        """
        try:
            data = yaml.safe_load(path.read_text("utf-8")) or {}
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            said = repr(first["input"])[:80]
            raise CheckpointError(f"{path}: {where}: {first['msg']}; it is {said}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
