"""Commands of the service: serve, token."""

from __future__ import annotations

import importlib.util
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

import typer

from manyicl.cli.options import (
    Calibrate,
    EndpointModel,
    MaxTokens,
    ModelPath,
    Normalize,
    Precision,
    Quantize,
    Recipe,
    Trust,
    check_endpoint,
    endpoint_settings,
    load_model,
)
from manyicl.errors import UserError, list_some

commands = typer.Typer()

if TYPE_CHECKING:
    from manyicl.service import Service

_MOST_GB = 1e9  # a finite number, above any machine's
# The extra `serve`: module -> package.
_PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
    "platformdirs": "platformdirs",
    "bm25s": "bm25s",
}


@commands.command("serve")
def serve_(
    model: ModelPath,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Folder of the tasks. Default: manyicl in the user's data folder."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; one that others can reach needs --token-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8300,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="Who may ask or change tasks: `manyicl token`.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Answer, but refuse every change of tasks.")] = False,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="This OpenAI-compatible server runs the model.")
    ] = None,
    endpoint_model: EndpointModel = None,
    max_queue: Annotated[
        int | None, typer.Option("--max-queue", min=1, help="Inputs that may wait; more are refused (429).")
    ] = None,
    cache_gb: Annotated[
        float | None, typer.Option("--cache-gb", min=0, max=_MOST_GB, help="Memory for encoded examples, in GB.")
    ] = None,
    spill_gb: Annotated[
        float | None,
        typer.Option("--spill-gb", min=0, max=_MOST_GB, help="Disk for encoded examples, in GB, under --data."),
    ] = None,
    max_upload_mb: Annotated[int, typer.Option("--max-upload-mb", min=1, help="Longest upload, in MiB.")] = 64,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure the shot curve of each task in the background.")
    ] = True,
    normalize: Normalize = "none",
    calibrate: Calibrate = "none",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log as JSON lines.")] = False,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Also log inputs and answers.")] = False,
    max_tokens: MaxTokens = None,
    precision: Precision = "auto",
    quantize: Quantize = "auto",
    recipe: Recipe = None,
    trust_remote_code: Trust = False,
) -> None:
    """Serve a model over HTTP: upload examples of a task, and ask it; also with OpenAI's client.

    Tasks are kept in --data. SIGTERM or Ctrl-C: stops after the requests that were taken.
    """
    _check_packages()
    ours = {"precision": precision, "quantize": quantize}
    check_endpoint(endpoint, ours=ours, theirs={"endpoint_model": endpoint_model})
    from manyicl import server
    from manyicl.inference import AnswerSettings
    from manyicl.service import ServiceSettings, open_service

    answering = AnswerSettings(normalize=normalize, calibrate=calibrate)
    given: dict[str, Any] = {
        "max_queue": max_queue,
        "cache_bytes": None if cache_gb is None else round(cache_gb * 1e9),
        "spill_bytes": None if spill_gb is None else round(spill_gb * 1e9),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    limits = ServiceSettings(measure=measure, answering=answering, **chosen)
    folder = data if data is not None else server.default_data_folder()

    def load() -> Service:
        if not log_json:  # the first load from a cold disk can take a minute
            typer.echo(f"loading {model}", err=True)
        loaded = load_model(
            model,
            recipe=recipe,
            max_tokens=max_tokens,
            precision=precision,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
            weights=endpoint is None,
        )
        settings = endpoint_settings(endpoint, endpoint_model or model)
        return open_service(loaded, data=folder, endpoint=settings, settings=limits)

    settings = server.ServerSettings(
        host=host,
        port=port,
        token_file=token_file,
        read_only=read_only,
        max_body_bytes=max_upload_mb << 20,
        log_json=log_json,
        log_texts=log_texts,
    )
    greet = _greet_in_json if log_json else partial(_greet, folder=folder, has_tokens=token_file is not None)
    server.run_server(load, settings, on_start=greet)
    if not log_json:
        typer.echo("stopped; tasks and examples are kept", err=True)


def _check_packages() -> None:
    """Refuse to start without a package of the extra `serve`, in one line."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        # Not the extra, which pip finds only if the package is on an index.
        raise UserError(f"manyicl serve: {missing[0]} is not installed; pip install {' '.join(_PACKAGES.values())}")


def _greet_in_json(url: str, service: Service) -> None:
    """Log that requests are accepted."""
    fields = {"url": url, "model": service.info.base_name, "tasks": len(service.tasks())}
    logging.getLogger("manyicl.server").info("started", extra=fields)


def _greet(url: str, service: Service, *, folder: Path, has_tokens: bool) -> None:
    """Print where the server is, what it serves, and how to add a task and ask it."""
    from manyicl.console import make_console
    from manyicl.server import has_page

    info, tasks = service.info, service.tasks()
    token = ' -H "Authorization: Bearer $TOKEN"' if has_tokens else ""
    named = list_some((f"{task.name} ({task.num_examples:,})" for task in tasks), most=5)
    name = quote(tasks[0].name, safe="") if tasks else "NAME"
    size = f"{info.num_parameters:,} parameters, {info.device}, {info.dtype}" if info.num_parameters else "on a server"
    page = f"  page    {url}/\n" if has_page() else ""
    make_console().print(
        f"manyicl serves {info.base_name} ({size}) at {url}\n"
        f"{page}"
        f"  API     {url}/docs; OpenAI's clients: base_url={url}/v1, model={info.base_name}:NAME\n"
        f"  tasks   {named if tasks else 'none yet'}; kept in {folder}\n"
        f"  add     curl{token} -F file=@NAME.csv {url}/v1/tasks\n"
        f'  ask     curl{token} --json \'{{"input": "TEXT"}}\' {url}/v1/tasks/{name}/predict\n'
        "Ctrl-C stops it after the requests that it has taken.",
        soft_wrap=True,
    )


@commands.command()
def token(
    file: Annotated[Path, typer.Option("--file", metavar="FILE", help="File of tokens; made if it is not there.")],
    role: Annotated[
        Literal["read", "admin"], typer.Option("--role", help="read: ask and look; admin: also change tasks.")
    ] = "read",
    note: Annotated[str, typer.Option("--note", help="Whose it is; stands in the file.")] = "",
) -> None:
    """Make a token for `manyicl serve --token-file FILE`; printed once, kept only as a hash."""
    _check_packages()
    from manyicl.server import make_token

    typer.echo(make_token(file, role=role, note=note))
