"""Tokens and their roles, and requests that come from pages of other sites."""

from __future__ import annotations

import stat

import httpx2
import pytest
from starlette.datastructures import Headers

from manyicl.errors import UserError
from manyicl.server import ServerSettings, make_token
from manyicl.server.access import is_from_other_site, is_loopback, load_tokens
from manyicl.server.gate import needed_role
from tests.support.serving import app_in_thread
from tests.support.slow_service import SlowService


def test_a_token_is_kept_as_a_hash_in_a_file_of_its_owner(tmp_path):
    path = tmp_path / "tokens.txt"
    token = make_token(path, role="admin", note="Ada's laptop")
    reader = make_token(path)
    text = path.read_text(encoding="utf-8")
    assert token not in text
    assert reader not in text
    assert "Ada's laptop" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tokens = load_tokens(path)
    assert (tokens.find_role(token), tokens.find_role(reader), tokens.find_role("manyicl-guess")) == (
        "admin",
        "read",
        None,
    )


def test_tokens_are_long_and_different(tmp_path):
    made = {make_token(tmp_path / "tokens.txt") for _ in range(20)}
    assert len(made) == 20
    assert min(map(len, made)) > 45


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "has no token"),
        ("admin manyicl-a-token-itself\n", "line 1: is not a role and a SHA-256"),
        ("# ours\nroot " + "0" * 64, "line 2"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_wrong_file_of_tokens_is_refused_without_its_content(tmp_path, content, fault):
    path = tmp_path / "tokens.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=fault) as caught:
        load_tokens(path)
    assert "manyicl-a-token-itself" not in str(caught.value)
    with pytest.raises(UserError):
        make_token(path)


def test_a_note_of_two_lines_cannot_add_a_token(tmp_path):
    with pytest.raises(UserError, match="line break"):
        make_token(tmp_path / "tokens.txt", note=f"x\nadmin {'0' * 64}")


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/", None),
        ("GET", "/page.js", None),
        ("GET", "/healthz", None),
        ("GET", "/metrics", "read"),
        ("GET", "/v1/tasks", "read"),
        ("POST", "/v1/tasks/banking/predict", "read"),
        ("POST", "/v1/chat/completions", "read"),
        ("POST", "/v1/tasks", "admin"),
        ("DELETE", "/v1/tasks/predict", "admin"),
        ("POST", "/v1/tasks/a/b/predict", "admin"),
        ("PATCH", "/v1/tasks/banking/examples/3", "admin"),
        ("POST", "/", "admin"),
    ],
)
def test_what_changes_something_needs_an_admin(method, path, role):
    assert needed_role(method, path) == role


@pytest.mark.parametrize(
    ("headers", "other"),
    [
        ({"host": "127.0.0.1:8300"}, False),
        ({"host": "localhost:8300", "origin": "http://localhost:8300"}, False),
        ({"host": "[::1]:8300"}, False),
        ({"host": "127.0.0.1:8300", "origin": "https://evil.example"}, True),
        ({"host": "127.0.0.1:8300", "origin": "http://127.0.0.1:9999"}, True),
        ({"host": "127.0.0.1:8300", "origin": "null"}, True),
        ({"host": "evil.example:8300", "origin": "http://evil.example:8300"}, True),
        ({"host": "[::"}, True),
    ],
)
def test_pages_of_other_sites_are_known_by_their_headers(headers, other):
    assert is_from_other_site(Headers(headers)) is other


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.4", "my-computer", "localhost.evil.example"])
def test_addresses_that_others_can_reach(host):
    assert not is_loopback(host)


@pytest.mark.slow
def test_roles_over_http(tmp_path):
    path = tmp_path / "tokens.txt"
    admin, reader = make_token(path, role="admin"), make_token(path)
    with app_in_thread(SlowService(), ServerSettings(token_file=path)) as url:

        def status(method: str, where: str, token: str | None) -> int:
            headers = {"authorization": f"Bearer {token}"} if token else {}
            body = {"json": {"input": "x"}} if method == "POST" else {}
            return httpx2.request(method, url + where, headers=headers, **body).status_code

        assert status("GET", "/v1/models", None) == 401
        assert status("GET", "/v1/models", reader + "x") == 401
        assert status("GET", "/v1/models", reader) == 200
        assert status("POST", "/v1/tasks/slow/predict", reader) == 200
        assert status("DELETE", "/v1/tasks/slow", reader) == 403
        assert status("DELETE", "/v1/tasks/other", admin) != 403
        assert status("GET", "/metrics", None) == 401
        assert status("GET", "/healthz", None) == 200
        refused = httpx2.get(url + "/v1/tasks", headers={"authorization": "Basic abc"})
        assert refused.json()["type"] == "urn:manyicl:unauthorized"
        assert refused.headers["www-authenticate"] == "Bearer"


def test_a_read_only_server_changes_nothing_for_an_admin_either(tmp_path):
    path = tmp_path / "tokens.txt"
    headers = {"authorization": f"Bearer {make_token(path, role='admin')}"}
    with app_in_thread(SlowService(), ServerSettings(token_file=path, read_only=True)) as url:
        refused = httpx2.delete(f"{url}/v1/tasks/slow", headers=headers)
        assert (refused.status_code, refused.json()["type"]) == (403, "urn:manyicl:read-only")
        assert httpx2.post(f"{url}/v1/tasks/slow/predict", json={"input": "x"}, headers=headers).status_code == 200


def test_a_page_of_another_site_cannot_send_a_form_to_a_server_without_tokens():
    with app_in_thread(SlowService()) as url:
        files = {"file": ("rows.csv", b"input,answer\na,b\n")}
        refused = httpx2.post(f"{url}/v1/tasks", files=files, headers={"origin": "https://evil.example"})
        assert (refused.status_code, refused.json()["type"]) == (403, "urn:manyicl:other-site")
        rebound = httpx2.get(f"{url}/v1/tasks", headers={"host": "evil.example"})
        assert rebound.status_code == 403
