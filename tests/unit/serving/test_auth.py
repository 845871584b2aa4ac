"""Keys: denied by default, never named, isolated from each other, limited."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from penstock import ConfigurationError, RequestPriority
from penstock.serving import ApiKey, ServingSettings
from penstock.serving.auth import Client, KeyRing
from penstock.serving.errors import HttpError
from penstock.serving.gate import OPEN_PATHS
from penstock.serving.process import ProcessSettings
from tests.unit.serving.service import CHAT, client_of

SETTINGS = ServingSettings(
    api_keys=(ApiKey(name="a", key="secret-a"), ApiKey(name="b", key="secret-b")), admin_key="secret-admin"
)
A, B = {"authorization": "Bearer secret-a"}, {"x-api-key": "secret-b"}


def test_every_route_but_the_open_ones_is_401_without_a_key() -> None:
    """Other servers forgot some."""
    with client_of(SETTINGS) as client:
        routes = [(method, route) for route in client.app.routes for method in getattr(route, "methods", ())]
        assert len(routes) > 12
        for method, route in [*routes, ("GET", "/nowhere"), ("POST", "/v1/chat/completions/")]:
            path = getattr(route, "path", route).replace("{model:path}", "x")
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-a"}, {"x-api-key": ""}):
                response = client.request(method, path, headers=headers)
                if path in OPEN_PATHS:
                    assert response.status_code == 200
                else:
                    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), path
                    assert method == "HEAD" or response.json()["error"]["type"] == "authentication_error"


def test_both_headers_carry_a_key() -> None:
    with client_of(SETTINGS) as client:
        for headers in (A, B, {"authorization": "bearer secret-b"}):
            assert client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200


def test_api_keys_do_not_open_admin_and_the_admin_key_does() -> None:
    with client_of(SETTINGS) as client:
        assert client.post("/admin/reset_prefix_cache", headers=A).status_code == 401
        admin = {"x-api-key": "secret-admin"}
        assert client.post("/admin/reset_prefix_cache", headers=admin).status_code == 200
        assert client.get("/metrics", headers=admin).status_code == 200
    with client_of() as client:
        assert client.post("/admin/reset_prefix_cache").status_code == 404


def test_a_preflight_needs_no_key_and_allows_the_sdks_headers() -> None:
    headers = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-lang,x-stainless-retry-count",
    }
    with client_of(SETTINGS) as client:
        response = client.options("/v1/chat/completions", headers=headers)
        assert response.status_code == 200
        assert "x-stainless-lang" in response.headers["access-control-allow-headers"]
        answer = client.post("/v1/chat/completions", json=CHAT, headers={**A, "origin": "https://page.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        refused = client.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://page.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "*")


def test_without_keys_only_pages_of_this_machine_may_call() -> None:
    with client_of() as client:
        for origin, allowed in (("http://localhost:3000", True), ("https://page.example", False)):
            response = client.get("/v1/models", headers={"origin": origin})
            assert ("access-control-allow-origin" in response.headers) is allowed
            assert response.status_code == (200 if allowed else 403)
        own = {"origin": "http://testserver", "host": "testserver"}
        assert client.post("/v1/chat/completions", json=CHAT, headers=own).status_code == 200
    with client_of(ServingSettings(cors_origins=("https://page.example",))) as client:
        response = client.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://page.example"})
        assert response.headers["access-control-allow-origin"] == "https://page.example"


def test_a_page_whose_name_was_given_this_machines_address_is_of_another_site() -> None:
    """It reached servers on loopback as a page of their own: DNS rebinding."""
    own = {"origin": "http://page.example:8000", "host": "page.example:8000"}
    local = {"origin": "http://localhost:8000", "host": "localhost:8000"}
    for host, allowed in (("127.0.0.1", False), ("localhost", False), ("::1", False), ("192.0.2.1", True)):
        with client_of(ProcessSettings(host=host, allow_anonymous=True)) as client:
            assert client.post("/v1/chat/completions", json=CHAT, headers=local).status_code == 200
            status = 200 if allowed else 403
            assert client.post("/v1/chat/completions", json=CHAT, headers=own).status_code == status
    with client_of(ProcessSettings(cors_origins=(own["origin"],))) as client:
        assert client.post("/v1/chat/completions", json=CHAT, headers=own).status_code == 200


def cached_tokens(client: Any, headers: dict[str, str]) -> int:
    body = {"messages": [{"role": "user", "content": "the penstock carries water " * 8}], "max_tokens": 2}
    answer = client.post("/v1/chat/completions", json=body, headers=headers).json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_two_keys_never_share_cached_prefixes() -> None:
    with client_of(SETTINGS) as client:
        assert cached_tokens(client, A) == 0
        assert cached_tokens(client, A) > 0
        assert cached_tokens(client, B) == 0  # what one key sent does not show to another, in either direction
        assert cached_tokens(client, B) > 0
        body = {**CHAT, "namespace": "a"}
        response = client.post("/v1/chat/completions", json=body, headers=B)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "namespace")


def test_a_namespace_isolates_where_there_are_no_keys() -> None:
    with client_of() as client:
        body = {"messages": [{"role": "user", "content": "the penstock carries water " * 8}], "max_tokens": 2}
        counts = [
            client.post("/v1/chat/completions", json={**body, "namespace": space}).json()["usage"]
            for space in ("x", "x", "y")
        ]
        assert [count["prompt_tokens_details"]["cached_tokens"] > 0 for count in counts] == [False, True, False]


def test_a_key_comes_as_text_digest_file_or_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.setenv("A_KEY", "from-env")
    digest = hashlib.sha256(b"hashed").hexdigest()
    keys = (
        *(ApiKey(name="1", key="plain"), ApiKey(name="2", sha256=digest)),
        *(ApiKey(name="3", file=tmp_path / "key"), ApiKey(name="4", env="A_KEY")),
    )
    ring = KeyRing(ServingSettings(api_keys=keys))
    for name, secret in zip("1234", ("plain", "hashed", "from-file", "from-env"), strict=True):
        assert ring.client({"x-api-key": secret}).name == name
    with pytest.raises(HttpError, match="missing or wrong"):
        ring.client({"x-api-key": digest})
    with pytest.raises(HttpError, match="missing or wrong"):
        ring.client({"x-api-key": "\udcff"})


@pytest.mark.parametrize("key", [{"file": Path("/nowhere")}, {"env": "NO_SUCH_KEY"}, {"key": ""}])
def test_a_key_that_cannot_be_read_is_a_configuration_error(key: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="'mine'"):
        KeyRing(ServingSettings(api_keys=(ApiKey(name="mine", **key),)))


def test_a_key_has_a_rate_and_says_when_to_come_back() -> None:
    now = [0.0]
    client = Client(ApiKey(name="a", key="x", requests_per_minute=2), clock=lambda: now[0])
    for _ in range(2):
        with client.admitted():
            pass
    with pytest.raises(HttpError, match="2 requests per minute") as refused, client.admitted():
        pass
    assert (refused.value.status, refused.value.retry_after_s) == (429, 30)
    now[0] = 30.1
    with client.admitted():
        pass


def test_a_key_has_so_many_open_requests() -> None:
    client = Client(ApiKey(name="a", key="x", max_concurrent=1))
    with client.admitted():
        with pytest.raises(HttpError) as refused, client.admitted():
            pass
        assert refused.value.status == 429
    with client.admitted():
        pass


def test_a_priority_above_the_ceiling_of_a_key_is_lowered() -> None:
    assert Client(ApiKey(name="a", key="x", max_priority="low")).priority_ceiling is RequestPriority.LOW
    assert Client().priority_ceiling is RequestPriority.CRITICAL
    with client_of(SETTINGS) as client:
        for priority in ("critical", 4, "low", 0, None):
            response = client.post("/v1/chat/completions", json={**CHAT, "priority": priority}, headers=A)
            assert response.status_code == 200
        for priority in ("urgent", 9, -1):
            assert (
                client.post("/v1/chat/completions", json={**CHAT, "priority": priority}, headers=A).status_code == 400
            )


def test_keys_are_in_no_representation_of_the_settings() -> None:
    assert "secret-" not in repr(SETTINGS)


def test_only_api_routes_exist() -> None:
    """A page of documentation would load scripts from elsewhere."""
    with client_of() as client:
        others = {route.path for route in client.app.routes if not isinstance(route, APIRoute)}
        assert others == {"/openapi.json"}


def test_a_key_may_have_any_characters() -> None:
    """Its bytes were compared as UTF-8 with a header that had been read as Latin-1."""
    with client_of(ServingSettings(api_keys=(ApiKey(name="a", key="schlüssel"),))) as client:
        for key in ("schlüssel".encode(), "schlüssel".encode("latin-1")):
            assert client.get("/v1/models", headers={"authorization": b"Bearer " + key}).status_code == 200
            assert client.get("/v1/models", headers={"x-api-key": key}).status_code == 200
        assert client.get("/v1/models", headers={"x-api-key": "schluessel"}).status_code == 401


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigurationError, match="key 'a': the environment variable NO_SUCH_KEY is not set"):
        KeyRing(ServingSettings(api_keys=(ApiKey(name="a", env="NO_SUCH_KEY"),)))


def test_a_file_that_is_no_text_holds_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="key 'a' cannot be read"):
        KeyRing(ServingSettings(api_keys=(ApiKey(name="a", file=tmp_path / "key"),)))


def test_an_empty_admin_key_is_refused_rather_than_opening_everything() -> None:
    """Regression: with `PENSTOCK_SERVE_ADMIN_KEY=` a request without any key was the administrator's."""
    with pytest.raises(ConfigurationError, match="admin_key is empty"):
        KeyRing(ServingSettings(api_keys=SETTINGS.api_keys, admin_key=""))


def test_the_digest_of_no_text_is_no_key() -> None:
    """Regression: it was accepted, and then a request without any key was its owner's."""
    with pytest.raises(ConfigurationError, match="key 'a' is empty"):
        KeyRing(ServingSettings(api_keys=(ApiKey(name="a", sha256=hashlib.sha256(b"").hexdigest()),)))


def test_one_key_under_two_names_is_refused() -> None:
    """Regression: the limits and the priority of one of the two had no effect."""
    keys = (ApiKey(name="a", key="same"), ApiKey(name="b", sha256=hashlib.sha256(b"same").hexdigest()))
    with pytest.raises(ConfigurationError, match="'a' and 'b' are the same key"):
        KeyRing(ServingSettings(api_keys=keys))
