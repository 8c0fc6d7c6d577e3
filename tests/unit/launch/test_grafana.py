"""The dashboard of Grafana and the alerts, against the metrics that distbench writes, and against a real Prometheus."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from distbench.report.document import ENDED
from distbench.report.export import prometheus
from distbench.report.results import Results
from tests.hosts import ROOT
from tests.results import limit, result, write_results

GRAFANA = ROOT / "launch" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "distbench.json").read_text())
ALERTS = ROOT / "launch" / "prometheus" / "alerts.yaml"
COLUMNS = 24
_VALUES = re.compile(r"label_values\((.*), (\w+)\)")
_SELECTED = re.compile(r"(distbench_\w+)(?:\{([^}]*)\})?")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")
_OF_PROMETHEUS = {"instance", "job"}


def queries() -> dict[str, str]:
    """Every query of the dashboard with the variables replaced by All, by panel and letter."""
    found = {
        f"{panel['title']}, {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }
    return {name: re.sub(r"\$(suite|instance)\b", ".*", query) for name, query in found.items()}


def variables() -> dict[str, str]:
    return {
        one["name"]: re.sub(r"\$suite\b", ".*", one["definition"])
        for one in DASHBOARD["templating"]["list"]
        if one["type"] == "query"
    }


def alerts() -> dict[str, str]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def metrics(folder: Path) -> dict[str, bytes]:
    """Text of two files of metrics: of a suite in which a case failed and one is missing, and of a run that passed."""
    ended = time.strftime(ENDED, time.gmtime(time.time() - 3600))
    failed = result("bad", "UNDER_LIMIT", suite="smoke", lost={"rows": 3}, limit=limit(5, "unsafe"))
    suite = [result("good", suite="smoke", ended=ended), failed]
    run = [result("alone", suite="distbench run", ended=ended)]
    texts = {}
    for name, reports, cases in (("suite", suite, 3), ("run", run, None)):
        file = io.BytesIO()
        prometheus.write(Results(write_results(folder / name, reports, cases)), file)
        texts[name] = file.getvalue()
    return texts


def known(folder: Path) -> dict[str, set[str]]:
    """Labels of every metric that distbench writes."""
    families = text_string_to_metric_families(metrics(folder)["suite"].decode())
    return {family.name: {*_OF_PROMETHEUS, *family.samples[0].labels} for family in families}


def unknown(query: str, labels: dict[str, set[str]]) -> set[str]:
    """Metrics of a query that distbench does not write, and labels that they do not have."""
    found = set()
    used: set[str] = set()
    for metric, matchers in _SELECTED.findall(query):
        named = set(re.findall(r"(\w+)\s*[=!]", matchers))
        found |= {metric} if metric not in labels else named - labels[metric]
        used |= labels.get(metric, set())
    grouped = {label for one in _GROUPED.findall(query) for label in one.split(", ")}
    return found | (grouped - used)


def test_every_query_selects_metrics_and_labels_that_distbench_writes(tmp_path: Path) -> None:
    labels = known(tmp_path)
    every = {**queries(), **variables(), **alerts()}
    assert {name: found for name, query in every.items() if (found := unknown(query, labels))} == {}
    shown = {metric for query in every.values() for metric, _ in _SELECTED.findall(query)}
    assert shown == labels.keys(), "a metric that no panel and no alert shows"


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("distbench_failures", {"distbench_failures"}),
        ('sum by (suite) (distbench_cases{result=~".*"})', {"result"}),
        ("sum by (arm) (distbench_cases)", {"arm"}),
    ],
)
def test_unknown_metric_or_label_in_a_query_is_noticed(tmp_path: Path, query: str, wrong: set[str]) -> None:
    assert unknown(query, known(tmp_path)) == wrong


def test_panels_lie_beside_each_other_and_ask_the_chosen_prometheus() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= COLUMNS for panel in panels)
    asked = [panel["datasource"]["uid"] for panel in panels]
    asked += [target["datasource"]["uid"] for panel in panels for target in panel["targets"]]
    assert set(asked) == {"${datasource}"}
    assert DASHBOARD["templating"]["list"][0]["name"] == "datasource"


def test_provisioned_folder_is_the_one_that_its_comment_mounts() -> None:
    path = GRAFANA / "provisioning" / "dashboards" / "distbench.yaml"
    (provider,) = yaml.safe_load(path.read_text())["providers"]
    assert f"launch/grafana/dashboards:{provider['options']['path']} " in path.read_text()
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"


class Metrics(SimpleHTTPRequestHandler):
    def guess_type(self, path: Any) -> str:  # noqa: ARG002 - one type for all
        return "text/plain; version=0.0.4"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Prometheus:
    """A real Prometheus on loopback."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **arguments: Any) -> Any:
        url = f"{self._address}/{path}?{urllib.parse.urlencode(arguments, doseq=True)}"
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - loopback
            return json.load(answer)["data"]

    def values(self, query: str) -> list[tuple[dict[str, str], float]]:
        found = self.get("query", query=query)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def wait(self, done: Any) -> None:
        """Wait until `done` answers True; Prometheus may not listen yet."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if done():
                    return
            except OSError:
                pass
            time.sleep(0.1)
        pytest.fail("Prometheus has not scraped within 60 s")


@contextmanager
def scraping(folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the metrics of `metrics` and judged the alerts."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("needs Prometheus: apt-get install prometheus")
    for name, text in metrics(folder / "results").items():
        (folder / name).write_bytes(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Metrics, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        targets = [{"targets": [f"127.0.0.1:{server.server_port}"]}]
        jobs = [{"job_name": name, "metrics_path": f"/{name}", "static_configs": targets} for name in ("suite", "run")]
        often = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
        config = folder / "prometheus.yml"
        config.write_text(yaml.safe_dump({"global": often, "rule_files": [str(ALERTS)], "scrape_configs": jobs}))
        command = [binary, f"--config.file={config}", f"--storage.tsdb.path={folder}/data", "--log.level=error"]
        with subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"]) as process:
            try:
                yield Prometheus(port)
            finally:
                process.terminate()
                process.wait()
                server.shutdown()


def firing(server: Prometheus) -> dict[str, list[str]]:
    """Suites of each alert that fires."""
    (group,) = server.get("rules")["groups"]
    return {rule["name"]: [one["labels"]["suite"] for one in rule["alerts"]] for rule in group["rules"]}


def test_a_real_prometheus_answers_every_query_and_judges_every_alert(tmp_path: Path) -> None:
    with scraping(tmp_path) as server:
        server.wait(lambda: len(server.values("distbench_info")) == 2)
        answered = {name: server.values(query) for name, query in queries().items()}
        assert not [name for name, found in answered.items() if not found]
        assert not server.values("distbench_no_such_metric")
        now = time.time()
        for query in queries().values():
            assert server.get("query_range", query=query, start=now - 5, end=now + 1, step=1)["result"], query
        for query in variables().values():
            match = _VALUES.fullmatch(query)
            assert match is not None
            assert server.get(f"label/{match[2]}/values", **{"match[]": match[1]}), query
        codes = {found["suite"]: code for found, code in answered["Exit code, A"]}
        assert codes == {"smoke": 3, "distbench run": 0}
        assert {found["verdict"]: count for found, count in answered["Cases not as expected, by verdict, A"]} == {
            "UNDER_LIMIT": 1
        }
        assert all(seconds > 0 for _, seconds in answered["Age of the results, A"])
        server.wait(lambda: firing(server)["DistbenchIncomplete"])
        (group,) = server.get("rules")["groups"]
        assert {rule["health"] for rule in group["rules"]} == {"ok"}
        assert firing(server) == {"DistbenchNotAsExpected": [], "DistbenchIncomplete": ["smoke"], "DistbenchStale": []}
