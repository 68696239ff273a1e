"""A parent in memory, and any submodel of it as a stock transformers model on the same weights."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from star_elastic import coded, stock, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.coded import Coded
from star_elastic.folder import CheckpointError, Reader, one_line
from star_elastic.layout import Layout
from star_elastic.submodel import ElasticSpace, Fields, Submodel, check_fields

_ADAPTER = "adapter_config.json"


class ElasticModel:
    """One set of weights, every size.

    `model["small"]` is a stock model whose parameters are views of the parent's; nothing is copied
    where the kept part is a plain corner of the tensor, and `copied_bytes` tells where it was not.
    A size is an object of its own, never a state of the parent: two may run at once.
    """

    def __init__(
        self,
        parent: PreTrainedModel,
        space: ElasticSpace | None = None,
        tokenizer: Any = None,
        source: Path | None = None,
        layer_order: Sequence[int] | None = None,
        held: Coded | None = None,
    ):
        """`held`: the parent's tensors, if they are codes; else they are read off the parent."""
        self.parent = stock.mend(parent)
        self.layout = Layout(parent.config, layer_order if space is None else space.layer_order)
        self.space = space or ElasticSpace.of(self.layout, {"full": {}}, trained=True)
        self.tokenizer = tokenizer
        self.source = source
        self._held = held
        self._views: dict[str, PreTrainedModel] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | str = "auto",
        device: str | None = None,
        check_digests: bool = True,
        bits: int | None = None,
    ) -> "ElasticModel":
        """Load an elastic checkpoint, or any model folder or hub id of a known family.

        A quantized one stays codes and scales, from which numbers are made as they are needed.

        Args:
            bits: read codes of eight bits in groups at fewer; see `at_bits`.

        Raises:
            CheckpointError: the folder is not what it says; see `Checkpoint.open`.
            ValueError: codes that are not run, or not at so few bits.
        """
        opened = Checkpoint.open(path, check_digests)
        has_tokenizer = (opened.path / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(opened.path) if has_tokenizer else None
        held = None
        if opened.is_quantized:
            parent, held = coded.load(opened, dtype, device)
        else:
            parent = _load(opened, dtype)
            parent = parent.to(device) if device else parent
        model = cls(parent.eval(), opened.space, tokenizer, opened.path, held=held)
        return model if bits is None else model.at_bits(bits)

    def at_bits(self, bits: int) -> "ElasticModel":
        """The same copy of codes of eight bits in groups, read at fewer, at every size.

        Raises:
            ValueError: weights that are no such codes.
        """
        if self._held is None:
            raise ValueError(f"{self.source}: bits {bits}: its weights are no codes")
        other = copy.copy(self)
        other._held = replace(self._held, bits=bits)
        other._views = {}
        other.parent = other.submodel()
        return other

    @property
    def sizes(self) -> dict[str, Submodel]:
        """The named sizes: fields, counts, measured quality."""
        return self.space.sizes

    def __getitem__(self, name: str) -> PreTrainedModel:
        if name not in self._views:
            if name not in self.sizes:
                raise KeyError(f"no size {name!r}; there are {', '.join(self.sizes)}")
            self._views[name] = self.submodel(**self.sizes[name].config)
        return self._views[name]

    def submodel(self, **fields: int | list[int]) -> PreTrainedModel:
        """A stock model of any size, e.g. `submodel(hidden_size=96)`, on views of the parent.

        A list gives one value per layer of the parent; such a model is made of stock layers.

        Raises:
            ValueError: a size this parent cannot hold, or that the stock class cannot express.
        """
        check_fields(self.layout, fields)
        model = stock.build_child(self.layout, fields).eval()
        with torch.no_grad():
            if self._held is not None:
                self._held.fill(model, fields)
            else:
                stock.set_tensors(model, self.narrowed(fields))
        stock.share_constants(model, self.parent)
        model.tie_weights()
        stock.refuse_meta(model)
        if self.parent.generation_config is not None:
            values = self.parent.generation_config.to_dict()
            model.generation_config = GenerationConfig.from_dict(values)
        return model

    def narrowed(self, fields: Fields) -> dict[str, Tensor]:
        """The submodel's tensors by in-memory name: views of the parent where possible.

        Differentiable when the parent's parameters require gradients and grad mode is on.
        """
        child = self.layout.sizes_of(fields)
        state = self.state
        return {
            name: self.layout.take(weight.name, state[weight.name], child)
            for name, weight in self.layout.kept(child, self.layout.weights)
        }

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The parent's tensors by in-memory name, as they are (not detached); codes are codes."""
        if self._held is not None:
            return self._held.tensors
        named = stock.get_tensors(self.parent)
        return {name: named[name] for name in self.layout.weights}

    def copied_bytes(self, model: PreTrainedModel) -> int:
        """Bytes of a submodel's weights that are not shared with the parent."""
        owned = {tensor.untyped_storage().data_ptr() for tensor in self.state.values()}
        return sum(
            tensor.untyped_storage().nbytes()
            for tensor in model.state_dict().values()
            if tensor.untyped_storage().data_ptr() not in owned
        )

    def save_pretrained(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the elastic checkpoint, atomically.

        Raises:
            FileExistsError: the folder exists and `overwrite` is false.
            ValueError: a quantized one, whose folder is what there is to copy.
        """
        if self._held is not None:
            raise ValueError(f"{self.source}: its weights are quantized; copy the folder")
        with torch.no_grad():
            tensors.write(
                path, self.state, self.layout, self.space, self.source, self.tokenizer, overwrite
            )


def _load(opened: Checkpoint, dtype: torch.dtype | str) -> Any:
    """The stock model of a verified folder, under the config that was verified.

    Raises:
        CheckpointError: the stock class refuses it, or it would not be the folder's own weights.
    """
    if (opened.path / _ADAPTER).exists():
        raise CheckpointError(
            f"{opened.path / _ADAPTER}: an adapter, which would change the parent"
        )
    if getattr(opened.config, "quantization_config", None):
        where = opened.path / "config.json"
        raise CheckpointError(f"{where}: quantization_config: the weights are not quantized")
    try:
        with Reader(opened.path, opened.stored):  # which tells if a file changes meanwhile
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                opened.path,
                config=opened.config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except CheckpointError:
        raise
    except Exception as error:  # many libraries, many kinds
        raise CheckpointError(f"{opened.path}: not loaded: {one_line(error)}") from None
    parent, info = loaded
    if lost := set(info["missing_keys"]) | set(info["mismatched_keys"]):
        raise CheckpointError(f"{opened.path}: {min(lost)}: not loaded")
    return parent


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder or hub id; code that it may bring is never run.

    Raises:
        CheckpointError: no tokenizer that stock classes can load.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{folder}/tokenizer_config.json: {one_line(error)}") from None
