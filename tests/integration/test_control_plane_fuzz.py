"""The control plane against requests made up from its own description, valid and invalid ones."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import AUTH, Served

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def served():
    served = Served(num_samples=4, consumers=["rank 0"], max_quarantined=4)
    yield served
    served.close()


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
ALWAYS_CARRIED_OUT = ["lease", "commit", "fail", "heartbeat", "leave", "checkpointed"]
MAY_BE_REFUSED = ["ack", "refs/poll", "refs/consumed"]


@pytest.mark.parametrize("name", ALWAYS_CARRIED_OUT + MAY_BE_REFUSED)
@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE])
def test_no_request_breaks_the_server_and_none_that_is_refused_changes_anything(served, name, mode):
    schema = schemathesis.openapi.from_url(f"{served.server.url}/openapi.json", headers=AUTH)
    operation = schema[f"/v1/{name}"]["POST"]
    statuses = set()

    @hypothesis.settings(
        max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def send(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("timeout_s"), float | int):
            case.body["timeout_s"] = min(case.body["timeout_s"], 0.0)
        before = served.controller.summary()
        assert case.call(headers={}).status_code == 401
        assert served.controller.summary() == before
        response = case.call(headers=AUTH)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)
        if response.status_code != 200:
            assert served.controller.summary() == before

    send()
    # Headers are made up too, the token's among them.
    assert statuses <= {200, 401, 409, 413, 422}
    assert 422 in statuses or mode is POSITIVE
    assert 200 in statuses or mode is NEGATIVE or name in MAY_BE_REFUSED
