"""vLLM serves one size straight out of an elastic checkpoint, cut while it loads.

    vllm serve CHECKPOINT --hf-overrides '{"elastic_size": "12b"}'

The plugin (entry point `vllm.general_plugins`) adds three things and replaces no model class but
one, on CPUs: the config that a size has (`config`), a loader that narrows every tensor before vLLM
shards it (`loader`), and a mixture of experts for CPUs, where vLLM has none for Nemotron-H
(`nemotron_h`). Nothing here is imported, nor vLLM needed, unless vLLM asks for it.
"""


def register() -> None:
    """Tell the vLLM of this process; called once in every process of it."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    from star_elastic.export.vllm import config, loader

    config.register()
    loader.register()
    if current_platform.is_cpu():
        ours = "star_elastic.export.vllm.nemotron_h:NemotronHForCausalLM"
        ModelRegistry.register_model("NemotronHForCausalLM", ours)
