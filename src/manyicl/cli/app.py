"""The command line, and how it ends: a mistake of the user's is one line and exit code 2."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from manyicl.cli import compare, data, evaluate, serve, train
from manyicl.cli.options import exit_code, in_flags, is_main
from manyicl.distributed import SharedError
from manyicl.errors import UserError, find_refusal


class _Commands(TyperGroup):
    """The verbs; one that is stopped where nothing can be resumed ends in a line, too."""

    def invoke(self, ctx: Any) -> object:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if is_main():
                typer.secho("stopped", err=True, fg=typer.colors.YELLOW)
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    name="manyicl",
    cls=_Commands,
    help="Many-shot in-context fine-tuning: one model, many tasks; bring examples, not adapters.\n\n"
    "Start with `manyicl demo`. Then: `check` your task files, `show` an episode, `train` a recipe, `eval` or `curve`"
    " the result, `ask` it, and `serve` it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for part in (data, train, evaluate, serve, compare):
    app.add_typer(part.commands)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    # torch and its neighbours warn about their own future on every import; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.formatwarning = lambda message, *_, **__: _format_warning(message)
    _open_streams()
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except TyperException as error:
        fault = _tell_mistake(error, sys.argv[1:])
        if not fault:
            sys.exit(2)  # nothing was asked, and the help is shown
    except UserError as error:
        if isinstance(error, SharedError) and not is_main():
            sys.exit(0)  # the main process tells it; a failure here would end that one before it could
        fault = in_flags(str(error))
    except Exception as error:
        refused = find_refusal(error)
        if refused is None:
            raise  # a bug of ours
        fault = refused
    typer.secho(f"error: {fault}", err=True, fg=typer.colors.RED)
    sys.exit(2)


def _tell_mistake(error: TyperException, arguments: Sequence[str]) -> str:
    """Return a mistake in the command line as one line: the option as it was given, what is wrong, and where help is.

    arguments: the command line. "" if there is none.
    """
    message = " ".join(error.format_message().split()).removesuffix(".")
    if isinstance(error, typer.BadParameter) and error.message and error.param is not None:
        values = [
            f"{name} {value if mark else following}"
            for argument, following in zip(arguments, [*arguments[1:], ""], strict=True)
            for name, mark, value in [argument.partition("=")]
            if name in error.param.opts
        ]
        fault = " ".join(error.message.removeprefix("Value error, ").split()).removesuffix(".")
        given = ", ".join(values) or error.param.get_error_hint().strip("'")
        message = f"{given}: {fault[:1].lower()}{fault[1:]}"
    context = getattr(error, "ctx", None)
    verb = f" {context.info_name}" if context is not None and context.parent is not None else ""
    return message and f"{message}; see manyicl{verb} --help"


def _format_warning(message: Warning | str) -> str:
    """Return a warning as one line, without the place in the code that it came from.

    >>> _format_warning(UserWarning("old.toml: a setting has a new name"))
    'warning: old.toml: a setting has a new name\\n'
    """
    return f"warning: {message}\n"


def _open_streams() -> None:
    """Have a place to print to if a stream is closed, and escapes for what its encoding does not know."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
