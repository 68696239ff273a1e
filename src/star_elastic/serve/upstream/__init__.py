"""Servers elsewhere that speak OpenAI's API, some for each size, as one backend.

One request's way: `Upstreams.answers` asks the size's `Pool` for a `Replica`, `call` sends it
there, `sse` cuts the stream into events, `chunks` makes pieces of them. `watch` asks every replica
again and again whether it is well.
"""

from star_elastic.serve.upstream.errors import UpstreamRefused
from star_elastic.serve.upstream.replica import ReplicaState
from star_elastic.serve.upstream.settings import UpstreamSettings
from star_elastic.serve.upstream.spec import Spec
from star_elastic.serve.upstream.upstreams import OfSize, Upstreams

__all__ = ["OfSize", "ReplicaState", "Spec", "UpstreamRefused", "UpstreamSettings", "Upstreams"]
