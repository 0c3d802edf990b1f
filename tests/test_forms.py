"""Whatever is sent to the site's forms: an answer, never a server error, and every page can still be shown."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urljoin, urlsplit

import httpx
import psutil
import pytest
from conftest import small_run
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from site_server import PATIENCE, Client, serving
from talker import talking

# `make fuzz` sends more.
REQUESTS = int(os.environ.get("PAIRTUNE_REQUESTS", "60")) * 5
# Gone after the first hit, so that all further requests would find nothing.
LEFT_OUT = ("/delete", "/leave")


@dataclass
class Form:
    """What a page lets a browser send: a form, a button that sends on its own, or a link with a query."""

    method: str
    action: str
    fields: list[tuple[str, str]] = field(default_factory=list)


class Forms(HTMLParser):
    """The forms of a page."""

    def __init__(self, page: httpx.Response) -> None:
        super().__init__()
        self.found: list[Form] = []
        self._where = str(page.url)
        self._form: Form | None = None
        self.feed(page.text)

    def _add(self, method: str, address: str) -> Form:
        parts = urlsplit(urljoin(self._where, address))
        self.found.append(Form(method, parts.path, parse_qsl(parts.query, keep_blank_values=True)))
        return self.found[-1]

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._form = self._add(given.get("method", "get").upper(), given.get("action", ""))
        elif tag == "a" and "?" in given.get("href", ""):
            self._add("GET", given["href"])
        elif method := next((each for each in ("get", "post") if f"hx-{each}" in given), None):
            self._add(method.upper(), given[f"hx-{method}"]).fields.append((given.get("name") or "value", ""))
        # The token against forged requests is sent in a header.
        named = given.get("name", "csrfmiddlewaretoken") != "csrfmiddlewaretoken"
        if tag in ("input", "textarea", "select", "button") and named and self._form:
            self._form.fields.append((given["name"], given.get("value", "Hello" if tag == "textarea" else "")))

    def handle_endtag(self, tag):
        if tag == "form":
            self._form = None


@dataclass
class Shared:
    """A site with a conversation, a match, a draft and a run, and the forms of all its pages."""

    client: httpx.Client
    pages: list[str]
    forms: list[Form]

    def send(self, form: Form, fields: list[tuple[str, str]], raw: bytes | None, kind: str) -> httpx.Response:
        headers = {"X-CSRFToken": self.client.cookies["csrftoken"], "Origin": str(self.client.base_url).rstrip("/")}
        if form.method == "GET":
            return self.client.get(form.action, params=fields)
        if raw is not None:
            return self.client.post(form.action, content=raw, headers=headers | {"Content-Type": kind})
        return self.client.post(form.action, data=_by_name(fields), headers=headers)


def _by_name(fields: list[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in fields:
        found.setdefault(name, []).append(value)
    return found


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("forms")
    (folder / "runs").mkdir()
    run = small_run(tiny_model, folder, samples=2, out=folder / "runs" / "small")
    shutil.copytree(run.root, folder / "runs" / "other")
    source = run.config.sources[0].source
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRTUNE_POSTS", "1000000")
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with (
            talking() as (address, _),
            serving(run.root.parent, folder / "site", "--backend", address) as site,
            Client(base_url=site.url) as client,
        ):
            client.get("/")
            made = Shared(client, [], [])
            said = {"prompt": "Hello", "model": "plain", "temperature": "0.7", "top_p": "1", "max_tokens": "9"}
            begun = [
                made.send(Form("POST", action), list(values.items()), None, "").headers["location"]
                for action, values in (
                    ("/chat/say", said),
                    ("/arena/start", {"prompt": "Hello"}),
                    ("/runs/new", {"source": str(source), "model": str(tiny_model)}),
                )
            ]
            made.pages += ["/", "/arena/", "/arena/standings", "/runs/", "/runs/new", "/runs/small/", *begun]
            made.pages += ["/runs/small/pairs", "/runs/small/push", "/runs/compare?run=small&run=other", "/enter"]
            seen = {}
            for page in made.pages:
                for form in Forms(client.get(page)).found:
                    if not form.action.endswith(LEFT_OUT):
                        seen.setdefault((form.method, form.action, str(sorted(dict(form.fields)))), form)
            made.forms += seen.values()
            yield made
    log = (folder / "site.log").read_text()
    assert "Traceback" not in log, log[-3000:]
    for process in psutil.process_iter(["cmdline"]):  # what the forms have started goes on without the site
        if str(folder) in " ".join(process.info["cmdline"] or ()):
            process.kill()


ODD = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "\0", "9" * 5000, "-1", "1e999", "nan", "\u202e", "../../etc/passwd", "%00%ff", "[]", "null"]),
    st.sampled_from(
        ["<script>alert(1)</script>", '{"a": [', "small", "other", "plain", "yes", "on", "2", "a" * 20_000]
    ),
)


@st.composite
def requests(draw, form: Form):
    fields = list(form.fields)
    for place in draw(st.lists(st.integers(0, max(len(fields) - 1, 0)), min_size=1, max_size=3)):
        odd = draw(ODD)
        match draw(st.sampled_from(["other", "other", "other", "twice", "absent", "unknown"])) if fields else "unknown":
            case "other":
                fields[place % len(fields)] = (fields[place % len(fields)][0], odd)
            case "twice":
                fields.append((fields[place % len(fields)][0], odd))
            case "absent":
                fields.pop(place % len(fields))
            case "unknown":
                fields.append((draw(st.text(st.characters(codec="utf-8"), max_size=20)), odd))
    raw = draw(st.none() | st.none() | st.none() | st.binary(max_size=200))
    types = ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json", ";;=", ""]
    return fields, raw, draw(st.sampled_from(types))


def _answers(shared: Shared, form: Form, number: int, count: int) -> set[int]:
    """The status codes of `count` odd requests to one form."""
    told = set()

    @seed(number)
    @given(requests(form))
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def send(request):
        answer = shared.send(form, *request)
        assert answer.status_code < 500, (form, request, answer.text[:500])
        told.add(answer.status_code)

    send()
    return told


def test_every_form_has_an_answer_to_anything(shared):
    each = -(-REQUESTS // len(shared.forms))
    told: dict[str, set[int]] = {}
    for number, form in enumerate(shared.forms):  # one after the other: drawn ones would leave some out
        told.setdefault(form.action, set()).update(_answers(shared, form, number, each))
    print(len(shared.forms), "forms with", each, "requests")
    print({action: sorted(codes) for action, codes in sorted(told.items())})
    wanted = {"/chat/say", "/arena/start", "/runs/new", "/runs/small/export", "/runs/small/push", "/runs/small/pairs"}
    assert wanted <= set(told)
    assert {200, 302, 400} <= set().union(*told.values())
    for page in shared.pages:
        assert shared.client.get(page, timeout=PATIENCE / 1000).status_code == 200, page
