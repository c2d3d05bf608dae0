"""The settings of a server: where it listens, whom it admits, and how much it takes from one request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server listens, whom it admits, and how much it takes from one request."""

    host: str = "127.0.0.1"
    """Address to listen on. One that other computers can reach needs a `token_file`."""
    port: int = 8300
    """0 takes a free port."""
    token_file: Path | None = None
    """File of hashed tokens (`manyicl token`). None: no token is needed, and only this computer is served."""
    read_only: bool = False
    """Refuse every change of tasks and examples, with any token."""
    max_body_bytes: int = 64 << 20
    """Longest body of a request; an upload that is compressed counts as it is unpacked."""
    max_inputs: int = 1000
    """Most inputs of one request."""
    default_deadline_s: float = 120.0
    """How long a request may wait for its answer if it does not say."""
    max_deadline_s: float = 600.0
    """The longest deadline that a request may ask for."""
    body_timeout_s: float = 60.0
    """How long a client may take to send a request."""
    send_timeout_s: float = 60.0
    """How long a client may leave a piece of an answer unread before it is cut off."""
    shutdown_s: float = 60.0
    """How long a server that is stopped goes on with the requests that it has taken."""
    log_json: bool = False
    """Write the log as JSON lines."""
    log_texts: bool = False
    """Also log inputs and answers, which are users' texts."""
