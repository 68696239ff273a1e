"""One checkpoint, every size: rank, train, slice, evaluate and run nested language models.

>>> from star_elastic import ElasticModel
>>> model = ElasticModel.from_pretrained("runs/demo/elastic")
>>> model["small"].generate(**model.tokenizer("2 + 3 =", return_tensors="pt"))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star_elastic.model import ElasticModel as ElasticModel

__all__ = ["ElasticModel"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `star-elastic --help` does not pay for importing torch and transformers.
    if name == "ElasticModel":
        from star_elastic.model import ElasticModel

        return ElasticModel
    raise AttributeError(f"module 'star_elastic' has no attribute {name!r}")
