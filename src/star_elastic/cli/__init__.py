"""The command line: one file per verb; a verb is a function, its flags are its arguments.

Verbs import torch and transformers when they run, so that `--help` answers at once.
"""

import sys

import typer

from star_elastic.cli import chat, evaluate, fit, inspect, rank, slice, train


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
        chat.chat,
    )
    for verb in verbs:
        app.command(verb.__name__.rstrip("_"))(verb)
    return app


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 1."""
    try:
        build_app()()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
