"""The command line: `latentflow COMMAND`. Other components add commands by entry points of the group "latentflow.commands"."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from latentflow.cli import generate as generate_module
from latentflow.cli import inspect as inspect_module
from latentflow.errors import LatentflowError

_INSTALL = "pip install '.[local]'"

app = typer.Typer(
    name="latentflow",
    help="Serve text-to-image workflows, one server for each model, and generate images with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=inspect_module.print_version
        ),
    ] = False,
) -> None:
    pass


app.command()(generate_module.generate)
app.command()(inspect_module.describe)
app.command()(inspect_module.models)
app.command()(inspect_module.validate)
app.command()(inspect_module.version)


def _unavailable(name: str, problem: Exception) -> Callable[[], None]:
    def command() -> None:
        raise LatentflowError(
            f"`latentflow {name}` needs packages that are not installed ({problem}). "
            f"Install them in a clone of the repository: {_INSTALL}"
        )

    command.__doc__ = escape(f"(not installed: {_INSTALL})")
    return command


def _add_commands() -> None:
    for point in entry_points(group="latentflow.commands"):
        try:
            command: Callable[..., Any] = point.load()
        except ImportError as problem:
            # It accepts any arguments, so that the error is about the missing packages and not about the arguments.
            settings = {"allow_extra_args": True, "ignore_unknown_options": True}
            app.command(point.name, context_settings=settings)(_unavailable(point.name, problem))
        else:
            app.command(point.name)(command)


def main() -> None:
    """The program `latentflow`. An error is one message on stderr and exit code 1; the exit code after Ctrl-C is 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # An error or a table may have characters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        _add_commands()
        app()
    except LatentflowError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
