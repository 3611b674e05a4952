"""schemathesis: requests made from the server's own OpenAPI, valid and broken, against a real socket.

All of its checks are on. One is told more: valid by the schema and still a 400 is fine, for rules between two fields
(as `stream_options` without `stream`), which OpenAPI can't say; such an answer has our error's shape, as all have.
tests/server holds that openapi.json is what the server serves.
"""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig

from tests.e2e.process import ROOT
from tests.e2e.scripted import ScriptedServer
from tests.e2e.wire import assert_idle

ACCEPTED = ["2xx", "400", "404", "413", "429"]
CONFIG = SchemathesisConfig.from_dict({"checks": {"positive_data_acceptance": {"expected-statuses": ACCEPTED}}})

schema = schemathesis.openapi.from_path(ROOT / "tests" / "server" / "openapi.json", config=CONFIG)


@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_operation(case: schemathesis.Case, scripted_server: ScriptedServer) -> None:
    case.call_and_validate(base_url=scripted_server.url, timeout=20)
    assert len(scripted_server.engine.in_flight) == 0


def test_nothing_is_left(scripted_server: ScriptedServer) -> None:
    assert_idle(scripted_server.url)
