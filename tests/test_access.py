"""A site that other machines can reach: nobody does more than their key allows, nor does any page of another site.

Every view of the site is tried with every role; `docs/security.md` names these tests threat by threat.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import small_run
from site_server import NEEDS_CHROMIUM, PATIENCE, watched
from talker import talking

pytest.importorskip("django")


APP = Path(__file__).parents[1] / "app"


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory):
    """A site for other machines, its address, and its keys by role."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "runs").mkdir()
    small_run(tiny_model, folder, samples=2, out=folder / "runs" / "small")
    (folder / "outside.txt").write_text("secret")
    with serving_openly(folder, PAIRTUNE_POSTS="100000") as found:
        yield found


class serving_openly:
    """`pairtune serve --host 0.0.0.0`, in a process of its own."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "pairtune", "serve", "--runs", str(folder / "runs"), "--host", "0.0.0.0"]  # noqa: S104
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--backend", "http://127.0.0.1:9", *flags],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PAIRTUNE_SITE": str(folder / "site"), **environment},
        )
        line = self.process.stdout.readline()
        self.log.seek(0)
        self.said = self.log.read()
        assert line, self.said
        self.url = line.split("/  ")[0].replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        self.keys = dict(re.findall(r"^  (owner|voter|viewer) +(\S+) ", self.said, re.MULTILINE))

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@contextmanager
def client_of(site, role: str | None, **more) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, timeout=PATIENCE / 1000, **more) as client:
        if role:
            client.get("/enter")
            done = client.post("/enter", data={"key": site.keys[role]}, headers=token(client))
            assert done.status_code == 302, done.text
        yield client


def token(client: httpx.Client) -> dict[str, str]:
    return {"X-CSRFToken": client.cookies.get("csrftoken", ""), "Origin": str(client.base_url).rstrip("/")}


def every_view() -> list[tuple[str, str]]:
    """The name and a path of every view."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pairtune.web.settings")
    import django

    django.setup()
    from pairtune.web.urls import urlpatterns

    arguments = {"int:pk": "987654", "str:name": "small", "str:what": "report"}
    return [
        (each.name, "/" + re.sub("<([^>]+)>", lambda found: arguments[found[1]], str(each.pattern)))
        for each in urlpatterns
        if each.name not in ("enter", "leave", "icons")
    ]


VIEWS = every_view()
GETS = {
    "viewer": {
        *("chat", "conversation", "models", "search", "arena", "match", "match-events", "standings", "events", "runs"),
        *("compare-runs", "run", "live", "report", "pairs"),
    }
}
POSTS = {
    "voter": {
        *("say-first", "say", "stop", "again", "go-on", "choose", "vote", "better", "branch", "save-preset"),
        *("match-start", "match-say", "match-vote", "match-withdraw"),
    }
}


@pytest.mark.parametrize("role", [None, "viewer", "voter", "owner"])
def test_every_view_asks_for_its_role(shared, role):
    """What is allowed here is written out a second time, so that a new view is closed until somebody decides."""
    with client_of(shared, role) as client:
        for name, path in VIEWS:
            may = role is not None and (role == "owner" or name in GETS["viewer"])
            answer = client.get(path)
            if answer.status_code == 405:  # only to be posted to; see below
                continue
            refused = answer.status_code == 403 or (
                answer.status_code == 302 and "/enter" in answer.headers["location"]
            )
            assert refused != may, (name, path, answer.status_code)


@pytest.mark.parametrize("role", [None, "viewer", "voter"])
def test_every_change_asks_for_its_role(shared, role):
    with client_of(shared, role) as client:
        client.get("/enter")
        for name, path in VIEWS:
            if role == "voter" and name in POSTS["voter"]:
                continue
            answer = client.post(path, headers=token(client))
            assert answer.status_code == 403, (name, path, answer.status_code)


_REACHED = """() => [...document.querySelectorAll("a[href], form, [hx-post], [hx-get]")]
  .filter(each => each.checkVisibility() && !each.hasAttribute("hx-trigger"))
  .flatMap(each => [
    each.hasAttribute("href") && ["GET", each.getAttribute("href")],
    each.hasAttribute("action") && [each.method.toUpperCase(), each.getAttribute("action")],
    each.hasAttribute("hx-post") && ["POST", each.getAttribute("hx-post")],
    each.hasAttribute("hx-get") && ["GET", each.getAttribute("hx-get")]
  ].filter(Boolean)).map(([method, where]) => [method, new URL(where, location).pathname])"""


@NEEDS_CHROMIUM
@pytest.mark.parametrize("role", ["viewer", "voter", "owner"])
def test_pages_offer_what_a_role_may_do_and_nothing_else(tiny_model, tmp_path, browser, role):
    """Every visible link, button and form of the pages that a role sees, against the two lists above."""
    from django.urls import resolve

    (tmp_path / "runs").mkdir()
    small_run(tiny_model, tmp_path, samples=2, out=tmp_path / "runs" / "small")
    with talking() as (address, _), serving_openly(tmp_path, "--backend", address) as site:
        with client_of(site, "owner") as client:
            message = {"prompt": "Hello", "model": "plain", "temperature": 0.7, "top_p": 1, "max_tokens": 9}
            said = client.post("/chat/say", data=message, headers=token(client))
            match = client.post("/arena/start", data={"prompt": "Hello"}, headers=token(client))
            assert (said.status_code, match.status_code) == (302, 302)
            tried = (said.headers["location"], match.headers["location"])
        pages = ["/", "/arena/", "/arena/standings", "/runs/", "/runs/small/", "/runs/small/pairs", *tried]
        with watched(browser, 1440, 900) as page:
            page.goto(f"{site.url}/enter")
            page.fill("[name=key]", site.keys[role])
            page.press("[name=key]", "Enter")
            page.wait_for_url(f"{site.url}/")
            reached = set()
            for path in pages:
                page.goto(site.url + path)
                reached |= {(method, resolve(where).view_name) for method, where in page.evaluate(_REACHED)}
    mine = {("GET", name) for name in GETS["viewer"]} | {("POST", "leave")}
    mine |= {("POST", name) for name in POSTS["voter"]} if role != "viewer" else set()
    if role == "owner":
        wanted = {"delete", "pin", "note", "export", "clone-run", "mark-pair", "answer-with", "say", "match-vote"}
        assert wanted <= {name for method, name in reached if method == "POST"}
        assert ("GET", "push") in reached
    else:
        assert reached <= mine, reached - mine
        assert ("POST", "say") in reached or role == "viewer"
    assert ("GET", "report") in reached


def test_a_voter_may_talk_and_vote(shared):
    with client_of(shared, "voter") as client:
        client.get("/")
        answer = client.post("/answers/987654/vote", headers=token(client))
        assert answer.status_code == 404  # allowed, but there is no such answer


def test_keys_are_shown_once_and_kept_as_hashes(shared, tmp_path):
    assert set(shared.keys) == {"owner", "voter", "viewer"}
    database = b"".join(file.read_bytes() for file in (Path(shared.log.name).parent / "site").glob("site.sqlite3*"))
    assert b"web_accesskey" in database
    for key in shared.keys.values():
        assert len(key) >= 32
        assert key.encode() not in database
    (tmp_path / "runs").mkdir()
    with serving_openly(tmp_path) as first:
        pass
    with serving_openly(tmp_path) as again:
        assert not again.keys
        assert "keys that were shown before" in again.said
        again.keys = first.keys
        with client_of(again, "owner") as client:
            assert client.get("/runs/").status_code == 200
    with serving_openly(tmp_path, "--new-keys") as replaced, client_of(replaced, "owner") as client:
        client.post("/enter", data={"key": first.keys["owner"]}, headers=token(client))
        assert replaced.keys != first.keys
        assert client.get("/runs/").status_code == 200  # a wrong key takes nothing away
        client.post("/leave", headers=token(client))
        assert client.post("/enter", data={"key": first.keys["owner"]}, headers=token(client)).status_code == 403


def test_who_guesses_or_floods_is_slowed_down(tmp_path):
    (tmp_path / "runs").mkdir()
    with serving_openly(tmp_path, PAIRTUNE_POSTS="30") as site, client_of(site, None) as client:
        client.get("/enter")

        def enter(key: str) -> int:
            return client.post("/enter", data={"key": key}, headers=token(client)).status_code

        assert enter(site.keys["voter"]) == 302
        codes = [enter(f"guess-{number}") for number in range(14)]  # perhaps over the end of a minute
        assert codes[0] == 403
        assert codes[-1] == 429
        assert enter(site.keys["owner"]) == 302, "nobody is kept out by somebody else's guesses"
        codes = [client.post("/leave", headers=token(client)).status_code for _ in range(61)]
        assert 429 in codes


@pytest.mark.parametrize(
    "wanted", ["//evil.example/", "https://evil.example/", "/\\evil.example", "javascript:alert(1)"]
)
def test_entering_leads_to_no_other_site(shared, wanted):
    with client_of(shared, None) as client:
        page = client.get("/enter", params={"next": wanted})
        assert 'name="next" value="/"' in page.text


def test_other_sites_pages_can_do_nothing(shared):
    with client_of(shared, "owner") as client:
        client.get("/")
        good = token(client)
        for headers in ({}, {**good, "Origin": "https://evil.example"}, {**good, "X-CSRFToken": "x" * 32}):
            assert client.post("/runs/small/stop", headers=headers).status_code == 403
        for host in ("evil.example", "127.0.0.1.evil.example"):
            assert client.get("/runs/", headers={"Host": host}).status_code == 400
        cookies = {cookie.name: cookie for cookie in client.cookies.jar}
        assert cookies["sessionid"].get_nonstandard_attr("SameSite") == "Strict"
        assert cookies["sessionid"].has_nonstandard_attr("HttpOnly")


def test_headers_forbid_what_the_site_does_not_need(shared):
    with client_of(shared, "viewer") as client:
        for path in ("/", "/runs/", "/nowhere", "/enter"):
            headers = client.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-frame-options"] == "DENY"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "same-origin"
            assert "server" not in headers
            assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "name",
    [
        *("..", "%2e%2e", "..%2foutside.txt", "%2e%2e%2foutside.txt", "small%2f..%2f..%2foutside.txt", ".hidden"),
        *("a" * 300, "%00"),
    ],
)
def test_no_name_leads_out_of_the_runs(shared, name):
    with client_of(shared, "owner") as client:
        for rest in ("", "report", "pairs", "download/report", "download/..%2f..%2foutside.txt"):
            answer = client.get(f"/runs/{name}/{rest}")
            assert answer.status_code in (301, 302, 404, 400) or answer.url.path == "/"  # the client took `..` away
            assert "secret" not in answer.text


def test_what_is_too_large_is_refused(shared):
    with client_of(shared, "voter") as client:
        client.get("/")
        answer = client.post("/chat/say", data={"prompt": "x" * 20_000_000}, headers=token(client))
        assert answer.status_code in (400, 413)


def test_a_site_of_one_machine_asks_for_no_key(tmp_path):
    (tmp_path / "runs").mkdir()
    with serving_openly(tmp_path, "--host", "127.0.0.1") as site:
        assert not site.keys
        answer = httpx.get(f"{site.url}/runs/", timeout=60)
        assert answer.status_code == 200
        assert "sessionid" not in answer.cookies


def test_a_proxy_on_this_machine_does_not_open_the_site(tmp_path):
    """A name that a proxy answers to makes it a site for others, although it listens on loopback."""
    (tmp_path / "runs").mkdir()
    with serving_openly(tmp_path, "--host", "127.0.0.1", PAIRTUNE_HOSTS="tuning.example") as site:
        assert set(site.keys) == {"owner", "voter", "viewer"}
        assert httpx.get(f"{site.url}/runs/", headers={"Host": "tuning.example"}, timeout=60).status_code == 302


def test_runserver_asks_for_keys_too(tmp_path):
    """Its settings are read before it knows the address."""
    command = [sys.executable, str(APP / "manage.py"), "runserver", "0", "--backend", "http://127.0.0.1:9"]
    more = {"PAIRTUNE_HOSTS": "tuning.example", "PAIRTUNE_RUNS": str(tmp_path), "PAIRTUNE_SITE": str(tmp_path / "site")}
    for address in ("0", "0.0.0.0:0"):
        command[3] = address
        given = more if address == "0" else {name: value for name, value in more.items() if name != "PAIRTUNE_HOSTS"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **given}
        )
        try:
            line = process.stdout.readline()
            url = re.sub(r"//[\w.]+:", "//127.0.0.1:", line.split("/  ")[0])
            for host in ("localhost", *(["tuning.example"] if "PAIRTUNE_HOSTS" in given else [])):
                answer = httpx.get(f"{url}/runs/new", headers={"Host": host}, timeout=60)
                assert (answer.status_code, "/enter" in answer.headers.get("location", "")) == (302, True)
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.mark.parametrize("role", ["viewer", "voter", "owner"])
def test_everybody_may_leave(shared, role):
    with client_of(shared, role) as client:
        assert client.get("/runs/").status_code == 200
        assert client.post("/leave", headers=token(client)).status_code == 302
        assert client.get("/runs/").status_code == 302


def certificate(folder: Path) -> tuple[Path, Path]:
    cryptography = pytest.importorskip("cryptography")
    assert cryptography
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return folder / "cert.pem", folder / "key.pem"


def test_with_a_certificate_everything_is_encrypted(tmp_path):
    cert, key = certificate(tmp_path)
    (tmp_path / "runs").mkdir()
    with serving_openly(tmp_path, "--cert", str(cert), "--key", str(key)) as site:
        assert "not encrypted" not in site.said
        site.url = site.url.replace("127.0.0.1", "localhost")
        trusted = ssl.create_default_context(cafile=cert)
        with client_of(site, None, verify=trusted) as client:
            page = client.get("/enter")
            assert page.headers["strict-transport-security"].startswith("max-age=")
            done = client.post(
                "/enter", data={"key": site.keys["viewer"]}, headers={**token(client), "Referer": f"{site.url}/enter"}
            )
            assert done.status_code == 302
            assert all(cookie.secure for cookie in client.cookies.jar)
            assert client.get("/runs/").status_code == 200


def test_djangos_own_check_is_clean():
    command = [sys.executable, "-m", "django", "check", "--deploy", "--fail-level", "WARNING"]
    more = {"DJANGO_SETTINGS_MODULE": "pairtune.web.settings", "PAIRTUNE_HOSTS": "x.example", "PAIRTUNE_TLS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **more})
    assert done.returncode == 0, done.stderr


def test_a_later_databases_is_refused_in_one_line(tmp_path):
    code = """
import sys
from pairtune.web.server import open_database
open_database()
from django.db.migrations.recorder import MigrationRecorder
from django.db import connection
MigrationRecorder(connection).record_applied("web", "0999_later")
"""
    environment = {**os.environ, "PAIRTUNE_SITE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    command = [sys.executable, "-m", "pairtune", "serve", "--port", "0", "--backend", "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert re.search("^error: .*site.sqlite3: was changed by a later version of pairtune \\(0999_later\\)", done.stderr)
    assert json.dumps(done.stderr).count("\\n") <= 2
