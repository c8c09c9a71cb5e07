"""What Meter counts, what Ray exports of it, and whether the dashboard asks for just that."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray.serve.metrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gdl_ray.engine import Load
from serve.metrics import Meter

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "infra" / "grafana" / "gdl_ray.json").read_text())

Series = dict[tuple[str, ...], float]


def load(active: int = 0, waiting: int = 0, step_s: float = 0.0) -> Load:
    return Load(slots=64, active=active, waiting=waiting, step_s=step_s, wait_s=0.0)


class Kept:
    """A metric of Ray's interface that keeps its series where the test can see them."""

    all: dict[str, Series] = {}

    def __init__(self, name: str, description: str, *rest: Any) -> None:
        assert description
        self.labels: tuple[str, ...] = rest[-1] if rest else ()
        self.series = self.all.setdefault(name, {})

    def inc(self, value: float, tags: Mapping[str, str]) -> None:
        assert value > 0  # or Ray raises
        at = self._at(tags)
        self.series[at] = self.series.get(at, 0) + value

    def observe(self, value: float, tags: Mapping[str, str]) -> None:
        self.inc(1, tags)

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self.series[self._at(tags or {})] = value

    def _at(self, tags: Mapping[str, str]) -> tuple[str, ...]:
        assert tags.keys() == set(self.labels)
        assert all(isinstance(value, str) for value in tags.values())
        return tuple(tags[label] for label in self.labels)


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> dict[str, Series]:
    monkeypatch.setattr(Kept, "all", {})
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray.serve.metrics, kind, Kept)
    return Kept.all


def test_what_happens_is_counted(series: dict[str, Series]) -> None:
    meter = Meter()
    meter.loaded("vae")
    meter.answered("vae", "sample", 200, 0.1)
    meter.answered("vae", "sample", 200, 0.1)
    meter.answered("vae", "sample", 429, 0.1, "queue-full")
    meter.sampled("vae", 16)
    meter.previewed("vae", 0.3)
    meter.swapped("vae")
    assert series["gdl_ray_requests"] == {("vae", "sample", "200"): 2, ("vae", "sample", "429"): 1}
    assert series["gdl_ray_request_seconds"] == {("vae", "sample"): 3}
    assert series["gdl_ray_errors"] == {("vae", "queue-full"): 1}
    assert series["gdl_ray_samples"] == {("vae",): 16}
    assert series["gdl_ray_first_preview_seconds"] == {("vae",): 1}
    assert series["gdl_ray_swaps"] == {("vae",): 1}


def test_clients_cannot_make_series(series: dict[str, Series]) -> None:
    meter = Meter()
    meter.loaded("vae")
    for i in range(1000):
        meter.answered(f"vae{i}", "sample", 404, 0.1, "unknown-model")
        meter.sampled(f"vae{i}", 1)
        meter.previewed(f"vae{i}", 1)
        meter.observe(f"vae{i}", load())
    assert series["gdl_ray_requests"] == {("other", "sample", "404"): 1000}
    assert max(map(len, series.values())) == 1


def test_a_model_that_has_gone_keeps_its_name(series: dict[str, Series]) -> None:
    meter = Meter()
    meter.loaded("vae")
    meter.unloaded("vae")
    meter.answered("vae", "sample", 503, 0.1, "not-loaded")
    assert series["gdl_ray_requests"] == {("vae", "sample", "503"): 1}


def test_versions_in_memory_are_counted_and_those_of_one_model_added_up(series: dict[str, Series]) -> None:
    meter = Meter()
    assert series["gdl_ray_models_loaded"] == {(): 0}
    for name in ("vae", "vae", "flow"):
        meter.loaded(name)
    assert series["gdl_ray_models_loaded"] == {(): 3}
    assert series["gdl_ray_model_loads"] == {("vae",): 2, ("flow",): 1}
    meter.observe("vae", load(active=60, waiting=7, step_s=0.2), load(active=4, step_s=0.1))
    gauges = ("queue_samples", "active_slots", "slots", "step_seconds")
    assert [series[f"gdl_ray_{gauge}"]["vae",] for gauge in gauges] == [7, 64, 128, 0.2]
    meter.unloaded("vae")
    assert series["gdl_ray_slots"]["vae",] == 128  # until the other version is observed alone
    meter.unloaded("vae")
    assert series["gdl_ray_models_loaded"] == {(): 1}
    assert [series[f"gdl_ray_{gauge}"]["vae",] for gauge in gauges] == [0, 0, 0, 0]


def test_without_ray_nothing_happens() -> None:
    meter = Meter()
    meter.loaded("vae")
    meter.answered("vae", "sample", 429, 0.1, "queue-full")
    meter.sampled("vae", 16)
    meter.previewed("vae", 0.3)
    meter.observe("vae", load())


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = DASHBOARD["panels"]
    return found


def test_grafana_can_import_the_dashboard() -> None:
    assert {"uid", "title", "schemaVersion", "version", "time", "timezone", "refresh"} <= DASHBOARD.keys()
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", DASHBOARD["uid"])
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "model"]
    assert [variable["type"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "query"]
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for panel in panels():
        assert {"type", "title", "gridPos", "fieldConfig", "options", "targets"} <= panel.keys()
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert all(x < 24 for x, _ in cells)
        assert not cells & taken
        taken |= cells


SCRIPT = """
import sys, time, urllib.request
from pathlib import Path
import ray
from ray import serve
from gdl_ray.engine import Load

@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0})
class Replica:
    def __init__(self):
        from serve.metrics import Meter
        self.meter = Meter()
        self.meter.loaded("toy")

    def work(self):
        meter = self.meter
        for _ in range(250):
            meter.answered("toy", "sample", 429, 0.1, "queue-full")
            meter.sampled("toy", 4)
        meter.previewed("toy", 0.3)
        meter.swapped("toy")
        meter.observe("toy", Load(slots=64, active=3, waiting=2, step_s=0.01, wait_s=0.0))

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
serve.start(proxy_location="Disabled")
handle = serve.run(Replica.bind(), name="gdl_ray", route_prefix=None)
for _ in range(32):
    handle.work.remote().result()
(node,) = ray.nodes()
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
swaps = 0
while swaps < 32:
    time.sleep(0.5)
    page = urllib.request.urlopen(url).read().decode()
    swaps = sum(float(line.split()[-1]) for line in page.splitlines() if "gdl_ray_swaps_total{" in line)
folder = Path(sys.argv[1])
(folder / "page").write_text(page)
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def exported() -> Iterator[Path]:
    """A folder with the page of a node's metrics port."""
    temp = Path(tempfile.mkdtemp(prefix="gdl-metrics-"))  # a short name: Ray's sockets stand in it
    env = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    try:
        subprocess.run([sys.executable, "-c", SCRIPT, str(temp)], cwd=ROOT, env=env, check=True, timeout=300)
        yield temp
    finally:
        shutil.rmtree(temp)


def samples(folder: Path) -> list[Sample]:
    """Everything on the page that is ours."""
    families = text_string_to_metric_families((folder / "page").read_text())
    return [sample for family in families for sample in family.samples if "gdl_ray" in sample.name]


@pytest.mark.slow
def test_the_dashboard_asks_for_what_is_exported_and_shows_all_of_it(exported: Path) -> None:
    names = {sample.name for sample in samples(exported)}
    asked = set(re.findall(r"\bray_gdl_ray_\w+", json.dumps(DASHBOARD)))
    assert asked == {name for name in names if not name.endswith(("_count", "_sum"))}


@pytest.mark.slow
def test_replicas_are_told_apart_and_counts_are_right(exported: Path) -> None:
    requests = [sample for sample in samples(exported) if sample.name == "ray_gdl_ray_requests_total"]
    assert len({sample.labels["replica"] for sample in requests}) == len(requests) == 2
    assert sum(sample.value for sample in requests) == 32 * 5 * 50
    for sample in requests:
        wanted = {"model": "toy", "operation": "sample", "status": "429", "application": "gdl_ray"}
        assert wanted.items() <= sample.labels.items()
