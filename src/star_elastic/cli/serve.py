"""`star-elastic serve`: one OpenAI-compatible server, every size from one copy of the weights."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def serve(
    checkpoint: Annotated[str, typer.Argument(help="a folder, or a hub id")],
    host: Annotated[str, typer.Option(help="where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="where to listen")] = 8000,
    name: Annotated[str | None, typer.Option(help="the model's id; the folder's name")] = None,
    sizes: Annotated[str | None, typer.Option(help="names to serve here, with commas; all")] = None,
    policy: Annotated[Path | None, typer.Option(help="what chooses the size, YAML")] = None,
    slots: Annotated[int, typer.Option(help="sequences at once")] = 16,
    max_length: Annotated[int, typer.Option(help="tokens of prompt and answer")] = 4096,
    cache_tokens: Annotated[
        int | None, typer.Option(help="tokens of all sequences together; slots x max length")
    ] = None,
    step_tokens: Annotated[int, typer.Option(help="tokens computed in one step")] = 512,
    dtype: Annotated[str, typer.Option(help="of the weights in memory")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    bits: Annotated[
        int | None, typer.Option(help="read codes of eight bits in groups at fewer: 2 to 8")
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option(help="SIZE=http://HOST:PORT, a server of that size; may be repeated"),
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="API keys; see `star-elastic keys`")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="names this server is called by, beyond localhost; *")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="pages of other origins that may ask (CORS)")
    ] = None,
    connections: Annotated[int, typer.Option(help="open at once")] = 1024,
    admin: Annotated[
        bool, typer.Option("--admin", help="let /admin add, resize and remove sizes")
    ] = False,
    drain_seconds: Annotated[
        float, typer.Option(help="that requests may take to finish after SIGTERM")
    ] = 30.0,
) -> None:
    """Every size answers, chosen request by request: by load, latency, cost, or by name.

    `model: "NAME"` lets the policy choose, `model: "NAME:SIZE"` pins a size.
    """
    import asyncio

    from star_elastic import stock
    from star_elastic.checkpoint import Checkpoint
    from star_elastic.model import ElasticModel
    from star_elastic.serve.api.app import OPEN, build_app
    from star_elastic.serve.guard import LOCAL, allow_files, guarded
    from star_elastic.serve.keys import Keys
    from star_elastic.serve.opening import Capacity, open_service
    from star_elastic.serve.running import configured, run
    from star_elastic.serve.settings import Settings
    from star_elastic.serve.upstream import Spec, Upstreams

    stock.quiet()
    console = Console(stderr=True)
    settings = Settings() if policy is None else Settings.read(policy)
    elsewhere = Upstreams([Spec.read(each) for each in upstream]) if upstream else None
    if elsewhere is None or sizes is not None:
        source = ElasticModel.from_pretrained(checkpoint, dtype=dtype, device=device, bits=bits)
    else:
        source = Checkpoint.open(checkpoint)  # others have the weights
    capacity = Capacity(slots, max_length, cache_tokens, step_tokens)
    chosen = None if sizes is None else sizes.split(",")
    served = name or Path(checkpoint).resolve().name
    known = None if keys is None else Keys.read(keys)
    opened = open_service(source, served, capacity, settings, chosen, known, elsewhere)
    hosts = [*LOCAL, *([] if host in ("0.0.0.0", "::") else [host]), *(allow_host or ())]
    app = guarded(
        build_app(opened, admin),
        known,
        hosts=hosts,
        origins=allow_origin or (),
        open_paths=OPEN,
        open_admin=admin,
    )
    allow_files(2 * connections + 256)  # each may be answered over another one
    console.print(f"{served}: {', '.join(opened.service.sizes)} at http://{host}:{port}/v1")
    try:
        config = configured(app, host, port, connections)
        asyncio.run(run(opened, config, drain_seconds))
    finally:
        opened.close()
