"""Options that several commands share, and how a long command is stopped and resumed."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from manyicl.errors import OutOfMemoryError, TerminatedError, UserError, find_refusal

if TYPE_CHECKING:
    from manyicl.inference import EndpointSettings, InferenceModel

TaskFolder = Annotated[
    Path, typer.Option("--tasks", help="Folder of task files (*.jsonl, *.json, *.csv, *.tsv, *.parquet).")
]
TaskNames = Annotated[
    list[str] | None, typer.Option("--task", help="A task of the folder; repeat for more. Default: all.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write the result (FILE.json).")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides what is drawn: shots, queries, episodes, samples.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", min=1, help="Longest sequence. Default: the budget of its training, or else all it can see."
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        help="Most tokens of a generated answer. Default: as many as the longest train answer has, at most 256.",
    ),
]
Normalize = Annotated[
    Literal["none", "tokens", "characters", "bytes"],
    typer.Option("--normalize", help="Divide the log-probability of a known answer by its length before choosing."),
]
Calibrate = Annotated[
    Literal["none", "contextual"],
    typer.Option(
        "--calibrate",
        help="contextual: divide the probability of a known answer by that after empty inputs.",
    ),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="A text that ends a generated answer; repeat for more.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, max=10, help="Sample generated answers; 0: the likeliest tokens.")
]
TopP = Annotated[
    float, typer.Option("--top-p", max=1, help="Sample from the likeliest tokens that have this probability together.")
]
Samples = Annotated[
    int, typer.Option("--samples", min=1, help="Generate so many answers, and take the one that most of them give.")
]
Choose = Annotated[
    Literal["random", "balanced", "nearest"],
    typer.Option(
        "--choose",
        help="How shots are chosen. balanced: labels take turns; nearest: the last --num-nearest are those most like"
        " the input (BM25), after shared random ones.",
    ),
]
NumNearest = Annotated[
    int | None,
    typer.Option("--num-nearest", min=1, help="Most shots of an input's own, with --choose nearest. Default: 8."),
]
ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_RUN",
        help="A checkpoint, an adapter, a run, a hub name, or a packaged model: seed, smollm2-many.",
    ),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Precision = Annotated[
    Literal["auto", "bf16", "fp32"],
    typer.Option("--precision", help="auto: bf16 if the device multiplies it in hardware, else fp32."),
]
Quantize = Annotated[
    Literal["auto", "nf4", "float8", "none"],
    typer.Option(
        "--quantize",
        help="Base in 4 bits (nf4), 8 (float8) or as it is (none). auto: as when its adapter was trained, else none.",
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="Write examples as this recipe's \\[template] says. Default: as the model was trained."
    ),
]
# Parameters that the library names in its messages and the command line has as options. A recipe's own keys, such as
# train.seed=1, stay as they are.
_NAMES = (
    "held_out|shots|choose|num_nearest|draws|queries|episodes|seed|seeds|max_tokens|max_new_tokens|normalize|calibrate"
    "|stop|temperature|top_p|samples|min_confidence|precision|quantize|compile|template|columns|config|name|family"
    "|answer_index|revision|endpoint|endpoint_model|concurrency|trust_remote_code|device|devices|recipe|out|resume"
)
_PLACES = "out|resume|recipe|endpoint|endpoint_model"
# Not a folder of a path, such as runs/seed=1/curve.json or seed=1/curve.json: few values have a slash.
_GIVEN = re.compile(rf"(?<![\w./\\-])((?:{_PLACES})(?==)|(?:{_NAMES})(?!=[^\s:;]*[/\\]))=(.)")
_NAMED = re.compile(rf"`({_NAMES}|compiled|endpoint\.model)`")


def in_flags(message: str) -> str:
    """Return a message of the library in the words of the command line.

    >>> in_flags("max_tokens=9: is too small; lower `shots`")
    '--max-tokens 9: is too small; lower --shots'
    """
    given = _GIVEN.sub(lambda found: f"{_flag(found[1])}{'' if found[2] == ':' else ' '}{found[2]}", message)
    return _NAMED.sub(lambda found: _flag(found[1]), given)


def _flag(name: str) -> str:
    name = {"compiled": "compile", "columns": "column"}.get(name, name)
    return f"--{name.replace('_', '-').replace('.', '-')}"


def split_overrides(recipe: Path | None, overrides: list[str] | None) -> tuple[Path | None, list[str]]:
    """Return the recipe and the overrides of a command that is resumed: the first argument may be an override, too.

    >>> split_overrides(Path("tasks.folder=/new/tasks"), ["model.path=base"])
    (None, ['tasks.folder=/new/tasks', 'model.path=base'])
    """
    given = list(overrides or ())
    if recipe is not None and "=" in str(recipe) and not recipe.exists():
        return None, [str(recipe), *given]
    return recipe, given


EndpointModel = Annotated[
    str | None, typer.Option("--endpoint-model", help="The server's name for the model. Default: MODEL_OR_RUN.")
]


def endpoint_settings(url: str | None, model: str, **more: int) -> EndpointSettings | None:
    """Return which server runs the model; None if none does. more: other fields of the settings.

    Raises:
        UserError: a package that servers need is not installed.
    """
    if url is None:
        return None
    try:
        from manyicl.inference import EndpointSettings
    except ModuleNotFoundError as error:
        # Not the extra, which pip finds only if the package is on an index.
        raise UserError(f"--endpoint: {error.name} is not installed; pip install httpx2 tenacity") from error
    return EndpointSettings(url, model=model, **more)


def check_endpoint(url: str | None, *, ours: Mapping[str, str | bool], theirs: Mapping[str, str | int | None]) -> None:
    """Refuse options that would do nothing with, or without, a server that runs the model.

    ours: options of a model in this process. theirs: those of the server.

    Raises:
        UserError: the first such option.
    """
    if url is None:
        for name, value in theirs.items():
            if value is not None:
                raise UserError(f"{_flag(name)}: needs --endpoint; leave it out")
        return
    for name, value in ours.items():
        if value not in ("auto", False):
            given = _flag(name) if value is True else f"{_flag(name)} {value}"
            raise UserError(f"{given}: the server decides it, with --endpoint; leave it out")


def load_model(model: str, *, recipe: Path | None, **options: Any) -> InferenceModel:
    """Return the model of a verb, in the template of a recipe if one is named. options: of `load_for_inference`."""
    from manyicl.inference import load_for_inference
    from manyicl.training import load_recipe

    return load_for_inference(model, template=load_recipe(recipe).template if recipe else None, **options)


def count_nearest(choose: str, num_nearest: int | None) -> int:
    """Return the most shots of an input's own.

    Raises:
        UserError: a number that would do nothing, because the nearest are not chosen.
    """
    from manyicl.inference import NUM_NEAREST

    if num_nearest is not None and choose != "nearest":
        raise UserError(f"--num-nearest {num_nearest}: does nothing with --choose {choose}; leave it out")
    return num_nearest or NUM_NEAREST


def is_main() -> bool:
    """Return whether this process reports for its launch; torch may not be loaded yet, so the environment decides."""
    return os.environ.get("RANK", "0") == "0"


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code of a process that was stopped: 128 and the number of the signal."""
    return 143 if isinstance(error, TerminatedError) else 130


@contextmanager
def stoppable(*command: str, kept: Path | None, recipe: Path | None = None) -> Iterator[None]:
    """Say in one line how to resume if the block is stopped, or memory or the system fail.

    Ctrl-C ends it with exit code 130, SIGTERM with 143.

    command: resumes it, after `manyicl`. kept: exists once there is something to resume. recipe: the file in which to
    change the setting that takes less memory. Default: the command takes the setting.
    """
    try:
        yield
    except OutOfMemoryError as error:
        if error.setting is None:
            raise
        setting, where = ([], f"write it into {recipe}, and ") if recipe else ([error.setting], "")
        command_line = shlex.join(["manyicl", *command, *setting])
        raise UserError(f"{error}; {where}resume with: {command_line}") from error
    except UserError:
        raise
    except Exception as error:
        refused = find_refusal(error)
        if refused is None:
            raise
        on = f"what was saved is kept; resume with: {shlex.join(['manyicl', *command])}"
        raise UserError(f"{refused}; {on if kept and kept.exists() else 'nothing is kept'}") from error
    except KeyboardInterrupt as error:
        on = f"; resume with: {shlex.join(['manyicl', *command])}" if kept and kept.exists() else ", nothing is kept"
        if is_main():
            typer.secho(f"stopped{on}", err=True, fg=typer.colors.YELLOW)
        raise typer.Exit(exit_code(error)) from None
