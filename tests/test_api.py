"""The worker's HTTP interface against its own description: whatever a client sends, the reply is one that it names."""

from __future__ import annotations

import os

import pytest
from conftest import small_run
from hypothesis import HealthCheck, given, settings

from pairtune.serve.api import make_app
from pairtune.serve.catalogue import Catalogue
from pairtune.serve.request import Limits

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import checks  # noqa: E402

KEY = "a-key"
MODEL = "run"
# `make fuzz` sends more.
REQUESTS = int(os.environ.get("PAIRTUNE_REQUESTS", "60"))
checks.load_all_checks()
CHECKS = [
    checks.CHECKS.get_one(name)
    for name in (
        *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
        *("response_headers_conformance", "response_schema_conformance"),
    )
]


@pytest.fixture(scope="module")
def api(tiny_model, tmp_path_factory):
    """The description as a client loads it from a running worker."""
    run = small_run(tiny_model, tmp_path_factory.mktemp("api"), samples=0)
    catalogue = Catalogue([str(run.root)], None, Limits(context=96))
    yield schemathesis.openapi.from_asgi("/openapi.json", make_app(catalogue, ["testserver", "localhost"], KEY))
    catalogue.close()


def served(case):
    """A served model in most of the requests that name one; otherwise few would get further than that."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) != 1:
        case.body = {**body, "model": MODEL}
    return case


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/chat/completions"])
def test_every_reply_is_one_that_is_described(api, path, mode):
    """With requests that the description allows, and with those that it does not."""
    (operation,) = [found for each in api.get_all_operations() if (found := each.ok()).path == path]
    told = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=REQUESTS, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def send(case):
        case = served(case)
        response = case.call(headers={"Authorization": f"Bearer {KEY}"})
        case.validate_response(response, checks=CHECKS)
        told.add(response.status_code)

    if mode == schemathesis.GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("takes nothing that could be wrong")
    send()
    print(path, mode.value, sorted(told))
    if operation.body:
        assert {200, 400} <= told if mode == schemathesis.GenerationMode.POSITIVE else 400 in told
    else:
        assert told == {200}
