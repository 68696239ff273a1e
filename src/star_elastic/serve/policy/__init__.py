"""Which size answers a request: an ordered list of policies, each of which narrows the choice."""

from star_elastic.serve.policy.cascade import Cascade, confidence
from star_elastic.serve.policy.choose import (
    Allowed,
    Choice,
    Chooser,
    Clock,
    Load,
    Pinned,
    Policy,
    Refused,
    Size,
    Wish,
)
from star_elastic.serve.policy.cost import Bucket, ByCost
from star_elastic.serve.policy.difficulty import ByDifficulty
from star_elastic.serve.policy.latency import ByLatency, Speeds
from star_elastic.serve.policy.load import ByLoad, Full
from star_elastic.serve.policy.quality import ByQuality

__all__ = [
    "Allowed",
    "Bucket",
    "ByCost",
    "ByDifficulty",
    "ByLatency",
    "ByLoad",
    "ByQuality",
    "Cascade",
    "Choice",
    "Chooser",
    "Clock",
    "Full",
    "Load",
    "Pinned",
    "Policy",
    "Refused",
    "Size",
    "Speeds",
    "Wish",
    "confidence",
]
