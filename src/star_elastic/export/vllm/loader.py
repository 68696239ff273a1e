"""The weights of a size, narrowed as they are read, for the stock vLLM model of its config.

A parent's tensor is read whole, narrowed by its named shape, and handed to vLLM's own weight
loaders, which shard it over tensor-parallel ranks. Beyond the model, that one tensor is all that
is held.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_world_group  # pyright: ignore[reportMissingImports]
from vllm.model_executor.model_loader import (  # pyright: ignore[reportMissingImports]
    DefaultModelLoader,
    register_model_loader,
)

from star_elastic.checkpoint import Checkpoint
from star_elastic.export.vllm.config import FIELDS, LOAD_FORMAT
from star_elastic.export.vllm.size import open_at, tensors_of


class ElasticLoader(DefaultModelLoader):
    """Loads a size out of an elastic checkpoint; `config` picks it."""

    def download_model(self, model_config: Any) -> None:
        """Fetch and verify the checkpoint.

        Raises:
            CheckpointError: see `Checkpoint.open`.
        """
        _open(model_config)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The size's tensors by their names on disk, one at a time.

        Raises:
            CheckpointError: see `Checkpoint.open`; or a file that changes meanwhile.
        """
        return tensors_of(_open(model_config), getattr(model_config.hf_config, FIELDS))

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fill every parameter of a model. vLLM refuses tensors that it has no parameter for.

        Raises:
            CheckpointError: see `get_all_weights`.
            ValueError: a tensor without its parameter, or a parameter without its tensor.
        """
        loaded = model.load_weights(self.get_all_weights(model_config, model))
        # vLLM makes a parameter of the scale of activations even where a format has none
        # (ModelOpt's W4A16), and drops it
        loaded |= {name for name, _ in model.named_parameters() if name.endswith("input_scale")}
        # vLLM's own check, as it is for quantized models: the other one lets linear layers pass
        self.track_weights_loading(model, loaded, quantized=True)


def register() -> None:
    """Make the loader known to vLLM."""
    register_model_loader(LOAD_FORMAT)(ElasticLoader)


def _open(model_config: Any) -> Checkpoint:
    """The checkpoint; its digests are checked once a machine, by its first process."""
    is_first = get_world_group().local_rank == 0
    return open_at(model_config.model, model_config.revision, check_digests=is_first)
