"""Who may do what: bearer tokens with a role, kept as hashes, and the requests of other sites' pages refused."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from manyicl.errors import UserError, take_path
from manyicl.files import write_atomically
from manyicl.locks import sole_writer

Role = Literal["read", "admin"]
_LINE = re.compile(r"(read|admin) ([0-9a-f]{64})(?: .*)?")
_EXAMPLE = "manyicl token --file tokens.txt --role admin"


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that a server accepts: pairs of a role and the SHA-256 of a token.

    A token has 256 random bits, so a plain hash of it can neither be reversed nor guessed.
    """

    entries: tuple[tuple[Role, str], ...]

    def find_role(self, token: str) -> Role | None:
        """Return the role of a token, None if it is unknown. The time that this takes tells nothing about the token."""
        digest = _hash(token)
        found: Role | None = None
        for role, known in self.entries:
            if hmac.compare_digest(digest, known) and found != "admin":
                found = role
        return found


def load_tokens(path: Path) -> Tokens:
    """Read a file of tokens: per line a role, the SHA-256 of the token, and an optional note.

    Raises:
        UserError: the file cannot be read, has a line that is none of these, or has no token.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make one with: {_EXAMPLE}") from error
    entries: list[tuple[Role, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:  # the line may be a token itself, so the message does not repeat it
            raise UserError(f"{path}, line {number}: is not a role and a SHA-256; make tokens with: {_EXAMPLE}")
        entries.append(("admin" if found[1] == "admin" else "read", found[2]))
    if not entries:
        raise UserError(f"{path}: has no token; make one with: {_EXAMPLE}")
    return Tokens(tuple(entries))


def make_token(path: str | Path, *, role: Role = "read", note: str = "") -> str:
    """Make a token, add its hash to a file of tokens, and return it. It is kept nowhere else.

    path: the file, which is made with permissions for its owner alone if it is not there.
    note: whose token it is, for the reader of the file.

    Raises:
        UserError: the file exists and is not a file of tokens, another process is writing it, the role is unknown, or
            the note has a line break.
    """
    path = Path(take_path("path", path))
    if role not in get_args(Role):
        raise UserError(f"role={role}: is unknown; known: {', '.join(get_args(Role))}")
    if not note.isprintable():
        raise UserError("note: has a line break or a control character; write one line of text")
    with sole_writer(path, is_file=True):  # or two at once would each write the other's token away
        return _add_token(path, role=role, note=note)


def _add_token(path: Path, *, role: Role, note: str) -> str:
    if path.exists():
        load_tokens(path)
        before = path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    else:
        before = "# Tokens of manyicl serve: role, SHA-256 of the token, note. Remove a line to withdraw its token.\n"
    token = f"manyicl-{secrets.token_urlsafe(32)}"
    write_atomically(path, f"{before}{role} {_hash(token)}{f' {note}' if note else ''}\n")
    os.chmod(path, 0o600)  # noqa: PTH101  # write_atomically has just replaced it
    return token


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def bearer_token(headers: Headers) -> str | None:
    """Return the token of an `Authorization: Bearer` header, None if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def is_loopback(host: str) -> bool:
    """Return whether only this computer can reach a host or address.

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "example.com")]
    [True, True, True, False, False]
    """
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_from_other_site(headers: Headers) -> bool:
    """Return whether a request to a server without tokens comes from a web page of another site.

    Any page that a user visits can send requests to this computer. The browser says where the page is from in `Origin`,
    and to whom it believes to speak in `Host`, which also gives away a name that an attacker points here (DNS
    rebinding).
    """
    host, origin = headers.get("host"), headers.get("origin")
    try:
        named = urlsplit(f"//{host}").hostname or ""
        foreign = origin is not None and urlsplit(origin).netloc != host
    except ValueError:  # a broken IPv6 address
        return True
    return foreign or (host is not None and not is_loopback(named))
