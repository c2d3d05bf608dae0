"""Run a server: bind its address first, load the model, serve until SIGINT or SIGTERM."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from platformdirs import user_data_path

from manyicl.errors import UserError, take_path
from manyicl.inference import EndpointSettings, InferenceModel
from manyicl.server.access import is_loopback, load_tokens
from manyicl.server.app import create_app
from manyicl.server.protocol import ImpatientProtocol
from manyicl.server.request_log import set_up_logs
from manyicl.server.settings import ServerSettings
from manyicl.service import Service, open_service

# Connections that are open at once; more get 503. A process may usually open 1,024 files.
_MOST_CONNECTIONS = 800


def default_data_folder() -> Path:
    """Return where tasks are kept if no folder is named: $MANYICL_DATA, else `manyicl` in the user's data folder."""
    named = os.environ.get("MANYICL_DATA")
    return Path(named) if named else user_data_path("manyicl", appauthor=False)


def serve(
    model: str | Path | InferenceModel,
    *,
    data: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8300,
    token_file: str | Path | None = None,
    endpoint: EndpointSettings | None = None,
    on_start: Callable[[str, Service], None] | None = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C or SIGTERM.

    model: a checkpoint, an adapter, a run, or a hub name; or a model that is loaded.
    data: folder of the tasks and their examples. Default: `default_data_folder()`.
    token_file: hashed tokens (`manyicl token`); needed for a `host` that other computers can reach.
    endpoint: a server with OpenAI's API that runs the model.
    on_start: called with the URL and the service once requests are accepted.

    Raises:
        UserError: the model, the data, the address or the tokens cannot be used.
    """
    folder = Path(take_path("data", data)) if data is not None else default_data_folder()
    tokens = Path(take_path("token_file", token_file)) if token_file is not None else None
    settings = ServerSettings(host=host, port=port, token_file=tokens)
    run_server(lambda: open_service(model, data=folder, endpoint=endpoint), settings, on_start=on_start)


def run_server(
    open_service: Callable[[], Service],
    settings: ServerSettings,
    *,
    on_start: Callable[[str, Service], None] | None = None,
) -> None:
    """Serve until the process gets SIGINT or SIGTERM, then finish the requests that were taken.

    open_service: loads the model; called once the address is known to be free. The service is closed at the end.
    on_start: called with the URL and the service once requests are accepted.

    Raises:
        UserError: the address is in use or cannot be had, it can be reached from elsewhere and there are no tokens, or
            the file of tokens cannot be used.
    """
    tokens = load_tokens(settings.token_file) if settings.token_file is not None else None
    if tokens is None and not is_loopback(settings.host):
        raise UserError(
            f"--host {settings.host}: other computers could reach it, and there are no tokens; make one with `manyicl"
            " token --file tokens.txt --role admin` and add --token-file tokens.txt"
        )
    listener = _bind(settings.host, settings.port)
    with listener:
        port = listener.getsockname()[1]
        service = open_service()
        try:
            with _naming_address(settings.host, port):  # another server may have bound it too, and been faster
                listener.listen()
            app = create_app(service, replace(settings, port=port), tokens=tokens)
            set_up_logs(as_json=settings.log_json)
            config = uvicorn.Config(
                app,
                http=ImpatientProtocol,
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_graceful_shutdown=max(1, round(settings.shutdown_s)),
            )
            announce = partial(on_start, _url_of(settings.host, port), service) if on_start is not None else None
            _Server(config, announce).run(sockets=[listener])
        finally:
            service.close(finish=False)


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it accepts requests."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        if self.started and self._announce is not None:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Stop after the requests that were taken; a second Ctrl-C stops at once. The process then ends by itself."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket with the address, which takes no connections yet.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: is not an address of this computer ({error})") from error
    try:
        with _naming_address(host, port):
            if os.name == "posix":  # a port can be taken again at once after a server ended
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except UserError:
        listener.close()
        raise
    return listener


@contextmanager
def _naming_address(host: str, port: int) -> Iterator[None]:
    """Turn the refusal of an address into one line that names it."""
    try:
        yield
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: another program uses it; choose another, or 0 for a free one") from error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error})") from error


def _url_of(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::", ""):  # any address of this computer
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
