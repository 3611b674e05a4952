"""Dashboard and alert rules against what /metrics really shows: every query parses, every name and label exists."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engine.types import ModelInfo
from engine.verification import VerifierCard
from server.metrics import Metrics
from tests.denoisers import FULL_INFO

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = {
    file.stem: json.loads(file.read_text()) for file in sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
}
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
PROMETHEUS_LABELS = {"job", "instance", "alertname", "alertstate"}  # what Prometheus adds to every series
INFO = ModelInfo("m", "demo", 8192, 49152, (2,), 16, 700, 1, "fp16", "speculative", max_draft=3)
INFO = replace(INFO, verifier="strict", verifiers=(VerifierCard("strict", True, "exact"),))
DENOISED = replace(INFO, max_draft=0, diffusion=FULL_INFO)


@functools.cache
def exposed() -> dict[str, set[str]]:
    """Sample name -> its label names, of a server with models that draft and denoise, a key and an exchange."""
    metrics = Metrics()
    metrics.observer("m", INFO)
    metrics.observer("d", DENOISED)
    metrics.watch("m", lambda: True)
    metrics.watch_key("team", lambda: 1)
    metrics.observe_http("/v1/completions", "POST", 200, 0.5, 100, 200)
    for reason in ("max_num_queued_reqs", "max_num_queued_tokens"):
        metrics.observer("m", INFO).on_rejected(reason)
    samples: dict[str, set[str]] = {"up": set(), "ALERTS": set()}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


def panel_queries() -> Iterator[tuple[str, str, str]]:
    """(title, query, legend) of every panel, and the queries behind variables and annotations."""
    for dashboard in DASHBOARDS.values():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield panel["title"], target["expr"], target["legendFormat"]
        for annotation in dashboard["annotations"]["list"]:
            if "expr" in annotation:
                yield annotation["name"], annotation["expr"], annotation["textFormat"]
        for variable in dashboard["templating"]["list"]:
            found = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable.get("definition", ""))
            if found:
                yield variable["name"], f"count by ({found[2]}) ({found[1]})", f"{{{{{found[2]}}}}}"


def parsed(query: str) -> promql_parser.Expr:
    return promql_parser.parse(query.replace("$__rate_interval", "1m").replace("$__range", "15m"))


def nodes(tree: object) -> Iterator[object]:
    """Every node of a parsed query."""
    yield tree
    for name in ("expr", "lhs", "rhs", "param", "vector_selector"):
        child = getattr(tree, name, None)
        if child is not None:
            yield from nodes(child)
    for child in getattr(tree, "args", ()) or ():
        yield from nodes(child)


def wrong_names(query: str, samples: dict[str, set[str]]) -> list[str]:
    """Metrics and labels that `query` uses and no scrape has."""
    wrong: list[str] = []
    known = set(PROMETHEUS_LABELS)
    for node in nodes(parsed(query)):
        if isinstance(node, promql_parser.VectorSelector):
            labels = samples.get(str(node.name))
            if labels is None:
                wrong.append(str(node.name))
                continue
            known |= labels
            wrong += [m.name for m in node.matchers.matchers if m.name not in labels | PROMETHEUS_LABELS]
    used = re.findall(r"\b(?:by|without|ignoring|on)\s*\(([^)]*)\)", query)
    wrong += [label for group in used for label in re.findall(r"\w+", group) if label not in known]
    return wrong


@pytest.mark.parametrize("title, query, legend", list(panel_queries()), ids=lambda value: str(value)[:40])
def test_a_panel_asks_for_what_is_exposed(title: str, query: str, legend: str) -> None:
    samples = exposed()
    assert not wrong_names(query, samples)
    shown = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend))
    known = {label for name, labels in samples.items() if name in query for label in labels} | PROMETHEUS_LABELS
    assert shown <= known | {"model_name"}, title


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_exposed_and_says_what_to_do(rule: dict[str, object]) -> None:
    query, annotations = str(rule["expr"]), rule["annotations"]
    assert not wrong_names(query, exposed())
    assert isinstance(annotations, dict) and {"summary", "description"} <= annotations.keys()
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})


def test_wrong_names_are_found() -> None:
    samples = exposed()
    assert wrong_names("sum by (modell) (rate(vllm:num_preemption_total[1m]))", samples) == [
        "vllm:num_preemption_total",
        "modell",
    ]
    assert wrong_names('1 - vllm:num_requests_running{modle_name="x"}', samples) == ["modle_name"]


def test_values_that_queries_pick_exist() -> None:
    metrics = Metrics()
    metrics.observer("m", INFO)
    metrics.observe_http("/v1/completions", "POST", 500, 0.5, 100, 200)
    page = metrics.render()[0].decode()
    queries = [*(query for _, query, _ in panel_queries()), *(str(rule["expr"]) for rule in RULES)]
    picked = {match for query in queries for match in re.findall(r'\w+="[^"$]+"', query)}
    jobs = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert picked - {f'job="{job["job_name"]}"' for job in jobs} - {'alertstate="firing"'} == {
        'status="5xx"',
        'finished_reason="error"',
    }
    assert 'status="5xx"' in page and 'finished_reason="error"' in page


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_whole(name: str) -> None:
    dashboard = DASHBOARDS[name]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert all(x < 24 for x, _ in cells) and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"] and panel["description"], panel["id"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == [
        "datasource",
        "model_name",
        "instance",
    ]
    assert dashboard["id"] is None and "slipstream" in dashboard["tags"]


def test_dashboards_are_found_and_lead_to_each_other() -> None:
    assert {name: dashboard["uid"] for name, dashboard in DASHBOARDS.items()} == {
        "slipstream": "slipstream",
        "decoding": "slipstream-decoding",
    }
    for dashboard in DASHBOARDS.values():
        (link,) = dashboard["links"]
        assert link["type"] == "dashboards" and link["tags"] == ["slipstream"] and link["includeVars"]


def test_every_series_of_our_own_is_on_some_panel() -> None:
    queries = " ".join(query for _, query, _ in panel_queries())
    own = {
        re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in exposed() if name.startswith("slipstream:")
    }
    # What a verifier's rounds bring is told by its tokens.
    assert {name for name in own if name not in queries} <= {"slipstream:spec_decode_rounds"}


def test_grafana_finds_its_files() -> None:
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/slipstream.yaml").read_text())["providers"][0]
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/slipstream.json"
    assert source["url"] == "http://prometheus:9090" and source["isDefault"]
