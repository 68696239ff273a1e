"""The config of a size, made where vLLM makes every config: before anything is derived from it."""

from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.config import (  # pyright: ignore[reportMissingImports]
    MODELS_CONFIG_MAP,
    VerifyAndUpdateConfig,
)
from vllm.transformers_utils.config import (  # pyright: ignore[reportMissingImports]
    HFConfigParser,
    register_config_parser,
)

from star_elastic.configs import read_config
from star_elastic.export.vllm.size import KEY, choose, config_values, open_at, size_in
from star_elastic.families import FAMILIES

FIELDS = "elastic_fields"  # set on a config that was cut: the size's own config fields
LOAD_FORMAT = "elastic"
_STOCK_FORMATS = ("auto", "hf", "safetensors")
_UNREAD = ("dummy", LOAD_FORMAT)  # formats that do not take a folder's tensors for the size's


class ElasticConfigParser(HFConfigParser):
    """vLLM's own parser of `config.json`, but for overrides with an `elastic_size`."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], Any]:
        """The values and the stock config of a model, or of the size that is asked for.

        Raises:
            CheckpointError: not a checkpoint that can be trusted, or no such size.
            ValueError: a size the parent cannot hold, or that the stock class cannot express.
        """
        wanted = size_in(kwargs.get("hf_overrides"))
        if wanted is None:
            return super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        checkpoint = open_at(model, revision, check_digests=False)  # the loader checks them
        size = choose(checkpoint, wanted)
        if not size.trained:
            init_logger(f"vllm.{__name__}").warning("%s: size %s is not trained", model, wanted)
        values = config_values(checkpoint, size)
        config = read_config(values)
        config.name_or_path = str(model)
        setattr(config, FIELDS, dict(size.config))
        return values, config


def register() -> None:
    """Put the parser in the place of vLLM's, and hold every config of our families against it."""
    register_config_parser("hf")(ElasticConfigParser)
    for family in FAMILIES:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        stock = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        MODELS_CONFIG_MAP[architecture] = _elastic(stock)


def _elastic(stock: Any) -> Any:
    """A family's last word on the engine's config, and then ours."""

    class ElasticConfig(stock):
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            stock.verify_and_update_config(vllm_config)
            _pick_loader(vllm_config)

    return ElasticConfig


def _pick_loader(vllm_config: Any) -> None:
    """Let our loader read the weights of a size.

    Raises:
        ValueError: a size that the config did not hear of, or a loader that would read the
            parent's tensors as they are: sizes that differ in layers alone would not show it.
    """
    config, load = vllm_config.model_config.hf_config, vllm_config.load_config
    wanted = getattr(config, KEY, None)
    if wanted is None:
        return
    if not hasattr(config, FIELDS):
        raise ValueError(
            f"{KEY} = {wanted!r}: not heard of in time; say it in --hf-overrides, as a name or as "
            "'field=number,...' (hf_overrides that are a function come too late)"
        )
    if load.load_format in _STOCK_FORMATS:
        load.load_format = LOAD_FORMAT
    elif load.load_format not in _UNREAD:
        raise ValueError(
            f"load_format {load.load_format!r} cannot cut {KEY} = {wanted!r} out of its parent; "
            "leave it out"
        )
