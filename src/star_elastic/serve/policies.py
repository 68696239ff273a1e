"""The policies that an operator's settings ask for, over the sizes that serve now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from star_elastic.serve.difficulty.file import load
from star_elastic.serve.judging import Judge
from star_elastic.serve.policy import (
    Bucket,
    ByCost,
    ByDifficulty,
    ByLatency,
    ByLoad,
    ByQuality,
    Cascade,
    Chooser,
    Clock,
    Full,
    Pinned,
    Policy,
    Size,
    Speeds,
)
from star_elastic.serve.settings import Settings


@dataclass(frozen=True)
class Policies:
    """The chooser, and those of its parts that want to be asked or told something besides."""

    chooser: Chooser
    cost: ByCost
    judge: Judge | None
    by_load: ByLoad | None

    @classmethod
    def of(
        cls,
        settings: Settings,
        sizes: Sequence[Size],
        speeds: Speeds,
        budgets: Mapping[str, Bucket],
        clock: Clock,
    ) -> "Policies":
        """Those that the settings ask for, in the order in which they narrow the choice.

        Args:
            budgets: of API keys by name.

        Raises:
            ValueError: a size that the settings name and nobody serves; a file of difficulty that
                cannot be used.
        """
        prices, everybody = settings.cost.prices, settings.cost.per_minute
        sizes = [Size(s.name, s.active_params, prices.get(s.name, s.price)) for s in sizes]
        named = {size.name: size for size in sizes}
        judge = None
        if said := settings.difficulty:
            judge = Judge(load(said.file), said.share)
        _check_named(settings, judge, named)
        cost = ByCost(budgets, None if everybody is None else Bucket(everybody, clock))
        policies: list[Policy] = [
            Full(**settings.overload.model_dump()),
            Pinned(),
            ByQuality({quality: named[size] for quality, size in settings.quality.items()}),
            ByLatency(speeds, **settings.latency.model_dump()),
            cost,
        ]
        if judge is not None:
            policies.append(ByDifficulty(judge.thresholds))
        by_load = None
        if settings.load is not None:
            by_load = ByLoad(sizes, clock, **settings.load.model_dump())
            policies.append(by_load)
        if settings.cascade is not None:
            policies.append(Cascade(settings.cascade.below))
        return cls(Chooser(sizes, policies), cost, judge, by_load)


def _check_named(settings: Settings, judge: Judge | None, served: Mapping[str, Size]) -> None:
    """Raises: ValueError: a size that the settings name and nobody serves."""
    wanted = {
        "quality": list(settings.quality.values()),
        "cost.prices": list(settings.cost.prices),
        "difficulty": [] if judge is None else judge.difficulty.sizes,
    }
    for field, names in wanted.items():
        for name in names:
            if name not in served:
                raise ValueError(f"policy {field}: size {name!r} is not among {', '.join(served)}")
