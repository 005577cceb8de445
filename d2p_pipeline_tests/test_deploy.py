"""The files of deploy/ are what the programs that read them take."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from d2p_pipeline.ingest import openapi
from d2p_pipeline.orchestration.decide import limits_of
from d2p_pipeline.settings import Settings, load

DEPLOY = Path(__file__).parents[1] / "deploy"
PROJECT = Path(__file__).parents[1] / "d2p_pipeline" / "orchestration" / "dagster.yaml"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def test_the_celery_instance_loads_and_differs_from_the_projects_only_where_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = pytest.importorskip("dagster_celery.launcher", reason="the extra celery is not installed")
    monkeypatch.setenv("CELERY_REDIS_URL", "redis://127.0.0.1:1/1")
    source = (DEPLOY / "celery" / "dagster.yaml").read_text()
    (tmp_path / "dagster.yaml").write_text(source)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert isinstance(instance.run_launcher, launcher.CeleryRunLauncher)
        assert instance.run_monitoring_enabled
        assert instance.run_monitoring_max_resume_run_attempts == 0
    ours, [celery] = yaml.safe_load(PROJECT.read_text()), documents(DEPLOY / "celery" / "dagster.yaml")
    assert {name for name in celery.keys() | ours.keys() if celery.get(name) != ours.get(name)} == {
        "run_launcher",
        "run_monitoring",
    }


def test_the_receivers_settings_exist_and_their_probes_ask_for_routes_that_do() -> None:
    found = {document["kind"]: document for document in documents(DEPLOY / "kubernetes" / "receiver.yaml")}
    assert found.keys() == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    pod = found["Deployment"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    given = {entry["name"].removeprefix("D2P_").lower(): entry["value"] for entry in container["env"]}
    settings = load(**given, allow_remote_without_token=True)
    assert settings.redis_skip_flush
    [port] = container["ports"]
    assert port["containerPort"] == settings.port
    routes = json.loads(openapi.document())["paths"]
    assert all(
        container[probe]["httpGet"]["path"] in routes for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    )
    labels = pod["metadata"]["labels"]
    selectors = [found["Deployment"]["spec"]["selector"]["matchLabels"], found["Service"]["spec"]["selector"]]
    selectors.append(found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"])
    assert all(selector == labels for selector in selectors)
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    # What is in flight may end: the pause before SIGTERM and the 30 s that the receiver gives it.
    assert pod["spec"]["terminationGracePeriodSeconds"] > 5 + 30


def test_the_charts_values_name_our_code_and_bound_what_a_run_takes() -> None:
    [values] = documents(DEPLOY / "kubernetes" / "values.yaml")
    [code] = values["dagster-user-deployments"]["deployments"]
    assert code["codeServerArgs"] == ["-m", "d2p_pipeline.definitions"]
    launcher = values["runLauncher"]["config"]["k8sRunLauncher"]
    assert code["envSecrets"] == launcher["envSecrets"] == [{"name": "d2p"}]
    limit = launcher["runK8sConfig"]["containerConfig"]["resources"]["limits"]["memory"]
    defaults = limits_of(Settings())
    assert int(limit.removesuffix("Mi")) << 20 > 8 * defaults.hot_bytes
