"""The command line: one file per verb; a verb is a function, its flags are its arguments.

Verbs import torch and transformers when they run, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Sequence

import typer

from star_elastic.cli import (
    adopt,
    audit,
    chat,
    evaluate,
    export,
    fit,
    inspect,
    keys,
    pack,
    quantize,
    rank,
    route,
    serve,
    slice,
    top,
    train,
    unpack,
    verify,
)

# Verbs that move bytes and run no model, unless a budget asks a trained router.
_MOVING_BYTES = {"slice", "verify", "inspect", "adopt", "pack", "unpack"}
_BUDGETS = {"--params", "--active", "--memory"}


def build_app() -> typer.Typer:
    """The `star-elastic` command with all its verbs."""
    app = typer.Typer(
        name="star-elastic",
        help="One checkpoint, every size: train, slice, inspect, evaluate and run nested models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    verbs = (
        rank.rank,
        train.train,
        slice.slice_,
        inspect.inspect,
        fit.fit,
        evaluate.evaluate,
        adopt.adopt,
        audit.audit,
        verify.verify,
        pack.pack,
        unpack.unpack,
        quantize.quantize,
        export.export,
        serve.serve,
        chat.chat,
        top.top,
    )
    for verb in verbs:
        app.command(verb.__name__.rstrip("_"))(verb)
    app.add_typer(keys.keys_app)
    app.add_typer(route.route_app)
    return app


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 1."""
    if not needs_torch(sys.argv[1:]):
        _spare_torch()
    try:
        build_app()()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def needs_torch(words: Sequence[str]) -> bool:
    """Whether what a user wrote runs a model; what only moves bytes does not."""
    flags = {word.partition("=")[0] for word in words}
    return not words or words[0] not in _MOVING_BYTES or bool(_BUDGETS & flags)


def _spare_torch() -> None:
    """Let transformers read configs without torch: 180 MiB and two seconds less for this process.

    None in `sys.modules` is how Python spells that a module cannot be imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn that torch is missing
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
