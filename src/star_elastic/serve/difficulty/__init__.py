"""How much a request gains from a larger size: told before it is answered, learned from outcomes.

Reading a file and telling difficulties takes neither torch nor an engine.
"""

from star_elastic.serve.difficulty.features import (
    NAMES,
    PROBE,
    PROMPT,
    Probe,
    conversation,
    features,
    probe_of,
)
from star_elastic.serve.difficulty.file import NAME, NEVER, Difficulty, Setting, load, save

__all__ = [
    "NAME",
    "NAMES",
    "NEVER",
    "PROBE",
    "PROMPT",
    "Difficulty",
    "Probe",
    "Setting",
    "conversation",
    "features",
    "load",
    "probe_of",
    "save",
]
