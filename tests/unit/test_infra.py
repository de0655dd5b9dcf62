"""Files that no other test runs: compose, Kubernetes, image, monitoring, hooks."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from services import cluster
from services.jobs.metrics import JobMetrics
from services.jobs.states import State
from services.platform.services import SERVICES, Machine, address
from services.serving.metrics import EndpointMetrics
from services.settings import Settings
from services.tracking import connection
from services.tracking.server import server_environment
from services.transport.metrics import TransportMetrics

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
EVERYWHERE = "0.0.0.0"

PLATFORM_SERVICES = {
    "ray-head": "ray",
    "mlflow": "mlflow",
    "jobs": "jobs",
    "transport": "transport",
    "endpoint": "endpoint",
}
"""The container of each process of ``monge up``."""

CONTAINER_OPTIONS: dict[str, dict[str, str | None]] = {
    "ray-head": {
        "--node-ip-address": None,
        "--dashboard-host": EVERYWHERE,
        "--dashboard-agent-listen-port": "52365",
        "--ray-client-server-port": "10001",
        "--temp-dir": "/tmp/ray",
        "--num-cpus": "${RAY_CPUS:-2}",
    },
    "mlflow": {
        "--host": EVERYWHERE,
        "--backend-store-uri": "postgresql://mlflow@postgres:5432/mlflow",
        "--artifacts-destination": "s3://mlflow",
        "--allowed-hosts": "localhost,localhost:*,127.0.0.1,127.0.0.1:*,mlflow,mlflow:*",
    },
    "transport": {"--host": EVERYWHERE, "--ray": "ray-head:6379"},
    "endpoint": {"--host": EVERYWHERE},
    "jobs": {"--host": EVERYWHERE},
}
"""Options that differ between a container and ``monge up``: addresses and stores. None: the container omits it."""

SERVICE_KEYS = {
    *("image", "build", "init", "user", "entrypoint", "command", "environment", "secrets", "volumes", "shm_size"),
    *("networks", "network_mode", "ports", "depends_on", "healthcheck", "restart", "profiles"),
    *("cap_drop", "security_opt"),
}
"""Keys of the Compose Specification that the files use."""

SECRETS: dict[str, set[str]] = {
    "POSTGRES_PASSWORD": {"mlflow", "postgres"},
    "MINIO_ROOT_USER": {"mlflow", "minio", "bucket"},
    "MINIO_ROOT_PASSWORD": {"mlflow", "minio", "bucket"},
    "MONGE_TOKEN": {"jobs"},
    "RAY_TOKEN_FILE": set(),
}
"""Containers with each secret in their environment."""

ALONE = ("transport", "jobs")
"""Deployments with one pod at a time."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return [document for path in _manifests() for document in yaml.safe_load_all(path.read_text())]


# Compose


def test_compose_has_only_what_the_specification_knows(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} == {"name", "services", "secrets", "volumes"}
    for name, service in compose["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert "image" in service, name
        assert all(isinstance(word, str) for word in service.get("command", [])), name
        assert all(isinstance(value, str) for value in service.get("environment", {}).values()), name


def test_compose_gives_gpus_to_what_uses_them(compose: dict[str, Any]) -> None:
    override = yaml.safe_load((ROOT / "infra" / "docker-compose.gpu.yml").read_text())
    assert override["services"].keys() == {"ray-worker", "endpoint"} <= compose["services"].keys()
    for name, service in override["services"].items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}, name
    # `auto` would take what the training needs.
    assert override["services"]["endpoint"]["environment"] == {"MONGE_SERVING_DEVICE": "${MONGE_SERVING_DEVICE:-cpu}"}


def test_compose_names_only_what_it_declares(compose: dict[str, Any]) -> None:
    services, mounted = compose["services"], set()
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], (name, needed)
            else:
                assert how["condition"] == "service_completed_successfully", (name, needed)
                assert services[needed]["restart"] == "no", (name, needed)
        if shared := service.get("network_mode"):
            assert shared.removeprefix("service:") in services
            assert not service.keys() & {"ports", "networks"}, "they belong to the owner of the network namespace"
        assert set(service.get("secrets", [])) <= set(compose["secrets"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), volume
                assert volume.endswith(":ro"), volume
            else:
                mounted.add(source)
    assert mounted == set(compose["volumes"])


def test_compose_publishes_on_loopback_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(published) == len(set(published)) > 0
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), port


def test_compose_services_are_watched_and_have_no_privileges(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert "healthcheck" in service or service["restart"] == "no", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("user") != "root", name


def test_compose_health_checks_ask_their_own_port(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for port in re.findall(r"http://127\.0\.0\.1:(\d+)", " ".join(service.get("healthcheck", {}).get("test", []))):
            owner = compose["services"][service.get("network_mode", name).removeprefix("service:")]
            said = " ".join([*service.get("command", []), *service.get("ports", []), *owner.get("ports", [])])
            assert re.search(rf"\b{port}\b", said), (name, port)


def test_compose_asks_for_its_secrets_and_has_defaults_for_the_rest(compose: dict[str, Any]) -> None:
    text = re.sub(r"^#.*", "", (ROOT / "docker-compose.yml").read_text(), flags=re.MULTILINE)
    uses = re.findall(r"(?<!\$)\$(?!\$)(\{(\w+)(:[?-])?([^}]*)\})?", text)
    assert all(use[0] for use in uses), "$ is either doubled or opens ${NAME…}"
    required = {name for _, name, kind, _ in uses if kind == ":?"}
    defaults = {name: default for _, name, kind, default in uses if kind == ":-"}
    assert {name for _, name, kind, _ in uses} == required | defaults.keys()
    assert required == set(SECRETS)
    assert not required & defaults.keys()
    services = compose["services"]
    for name, service in services.items():
        said = re.findall(r"(?<!\$)\$\{(\w+)", " ".join(service.get("command", [])))
        assert not set(said) & required, f"{name}: a command line is for all to read"
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|KEY_ID|ROOT_USER|_TOKEN$", key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), (name, key)
    for secret, holders in SECRETS.items():
        told = {name for name, service in services.items() if secret in str(service.get("environment"))}
        assert told == holders, secret

    example = dict(line.split("=", 1) for line in (INFRA / ".env.example").read_text().splitlines() if _assigns(line))
    assert example == defaults | dict.fromkeys(required, "") | {"RAY_TOKEN_FILE": "infra/ray.token"}
    assert {".env", "ray.token"} <= set((INFRA / ".gitignore").read_text().split())


def test_every_service_of_monge_up_has_a_container() -> None:
    assert list(PLATFORM_SERVICES.values()) == [service.name for service in SERVICES]


@pytest.mark.parametrize("container", PLATFORM_SERVICES)
def test_containers_run_the_commands_of_monge_up(compose: dict[str, Any], container: str, tmp_path: Path) -> None:
    usual = {setting: address(setting, port) for service in SERVICES for setting, port in service.ports.items()}
    (service,) = [service for service in SERVICES if service.name == PLATFORM_SERVICES[container]]
    command, _ = service.command(Machine(tmp_path, usual))
    program, options = _parsed(command)
    for name, value in CONTAINER_OPTIONS[container].items():
        options.pop(name, None)
        if value is not None:
            options[name] = value
    assert _parsed(compose["services"][container]["command"]) == (["python", *program[1:]], options)


def test_ray_workers_are_started_like_the_head(compose: dict[str, Any]) -> None:
    head, worker = (_parsed(compose["services"][name]["command"]) for name in ("ray-head", "ray-worker"))
    heads_own = {"--head", "--port", "--dashboard-host", "--dashboard-port", "--ray-client-server-port"}
    heads_own |= {"--temp-dir", "--resources"}
    shared = {name: value for name, value in head[1].items() if name not in heads_own}
    assert worker == (head[0], shared | {"--address": "ray-head:6379"})


def test_addresses_lead_to_the_services(compose: dict[str, Any]) -> None:
    services = compose["services"]
    addresses = compose["x-addresses"]
    assert {name.removeprefix("MONGE_").lower() for name in addresses} <= set(Settings.model_fields)
    for name, told in addresses.items():
        if name == "MONGE_HOME":
            continue
        where = urlsplit(told if "//" in told else f"//{told}")
        options = _parsed(services[where.hostname]["command"])[1]
        port = options["--dashboard-port"] if name == "MONGE_RAY_DASHBOARD" else options["--port"]
        assert str(where.port) == port, name
        assert options.get("--host", EVERYWHERE) == EVERYWHERE, name
    for name in ("ray-head", "ray-worker", "transport", "endpoint", "jobs"):
        assert services[name]["environment"].items() >= addresses.items()
    for name in ("ray-head", "ray-worker", "transport", "jobs"):
        assert services[name]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert services[name]["secrets"] == ["ray_token"]


def test_the_job_service_keeps_its_jobs_and_links_to_what_a_browser_reaches(compose: dict[str, Any]) -> None:
    services = compose["services"]
    environment = services["jobs"]["environment"]
    assert f"home:{environment['MONGE_HOME']}" in services["jobs"]["volumes"]
    ours = {name.removeprefix("MONGE_").lower() for name in environment if name.startswith("MONGE_")}
    assert ours <= set(Settings.model_fields)
    public = urlsplit(environment["MONGE_MLFLOW_PUBLIC_URI"])
    assert f"{public.hostname}:{public.port}:{public.port}" in services["mlflow"]["ports"]


# The image


def test_image_copies_what_exists_and_is_not_ignored() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    admitted = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = set()
    for line in _instructions("COPY"):
        *sources, _ = line.split()
        for source in sources:
            found = {name for name in admitted if fnmatch(name, source)}
            assert found, source
            copied |= found
    assert copied == admitted
    assert all((ROOT / name).exists() for name in admitted)


def test_image_is_pinned_and_not_run_by_root() -> None:
    installs = [line for line in _instructions("RUN") if "pip install" in line]
    assert len(installs) == 3
    for line in installs:
        # The wheel itself brings nothing with it: what it needs is there already.
        assert line.count("pip install") == line.count("-c constraints.txt") or "--no-deps /wheels" in line, line
    assert _instructions("USER") == ["monge"]
    assert [line.split()[0] for line in _instructions("FROM")] == ["python:3.11-bookworm", "${BASE}"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {"psycopg", "psycopg-binary"} <= pinned.keys()


def test_image_has_the_environment_of_monge_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.os, "environ", {})
    assert connection.os is cluster.os
    expected = {
        **cluster.ray_environment(Settings(ray_address="ray-head:6379")),
        **server_environment(),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "MONGE_HOME": "/data",
    }
    found = dict(re.findall(r"((?:RAY|TORCH|MLFLOW|MONGE)_\w+)=(\S+)", " ".join(_instructions("ENV"))))
    assert found == expected


# Kubernetes


def test_kustomization_lists_every_file(objects: list[dict[str, Any]]) -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == sorted(path.name for path in _manifests())
    versions = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    assert kustomization["images"] == [{"name": "monge", "newTag": versions["fallback_version"]}]
    names = [(document["kind"], document["metadata"]["name"]) for document in objects]
    assert len(names) == len(set(names))
    readme = (KUBERNETES / "README.md").read_text()
    assert set(re.findall(r"`(\w+\.yaml)`", readme)) == set(kustomization["resources"])


def test_pods_name_only_what_exists(objects: list[dict[str, Any]]) -> None:
    known = {(document["kind"], document["metadata"]["name"]) for document in objects}
    made = _secrets_of_readme()
    holders: dict[str, set[str]] = {}
    for document, pod in _pods(objects):
        volumes = {volume["name"] for volume in pod["volumes"]} if "volumes" in pod else set()
        for volume in pod.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in known
        for container in _containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            secrets = {source["secretRef"]["name"] for source in container["envFrom"] if "secretRef" in source}
            keys = [one["valueFrom"]["secretKeyRef"] for one in container.get("env", []) if "valueFrom" in one]
            assert all(key["key"] in made[key["name"]] for key in keys), document["metadata"]["name"]
            assert secrets <= made.keys(), document["metadata"]["name"]
            for secret in secrets:
                holders.setdefault(secret, set()).add(container["name"])
            for source in container["envFrom"]:
                if "configMapRef" in source:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in known
    assert holders == {"monge-mlflow": {"mlflow"}, "monge-jobs": {"jobs"}}
    assert made["monge-jobs"] == {"MONGE_TOKEN"}


def test_pods_run_as_nobody_special(objects: list[dict[str, Any]]) -> None:
    for document, pod in _pods(objects):
        name = document["metadata"]["name"]
        assert pod["enableServiceLinks"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 1000, name
        for container in _containers(pod):
            assert container["image"] == "monge", name
            privileges = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == privileges, name
            assert container["resources"]["requests"].items() <= container["resources"]["limits"].items(), name
            assert "startupProbe" in container, name


@pytest.mark.parametrize("name", ["mlflow", "transport", "endpoint", "jobs"])
def test_deployments_run_the_commands_of_compose(
    compose: dict[str, Any], objects: list[dict[str, Any]], name: str
) -> None:
    found = {(document["kind"], document["metadata"]["name"]): document for document in objects}
    deployment = found["Deployment", name]["spec"]
    container = deployment["template"]["spec"]["containers"][0]
    variables = {
        key: value
        for source in container["envFrom"]
        if "configMapRef" in source
        for key, value in found["ConfigMap", source["configMapRef"]["name"]]["data"].items()
    }
    command = [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word) for word in container["command"]]
    assert [word.replace("monge-head-svc", "ray-head") for word in command] == compose["services"][name]["command"]

    port = int(_parsed(command)[1]["--port"])
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    service = found["Service", name]["spec"]
    assert service["ports"] == [{"name": "http", "port": port, "targetPort": "http"}]
    assert service["selector"] == deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]


@pytest.mark.parametrize("name", ALONE)
def test_the_old_pod_ends_before_the_new_one_starts(objects: list[dict[str, Any]], name: str) -> None:
    (deployment,) = [
        document["spec"]
        for document in objects
        if (document["kind"], document["metadata"]["name"]) == ("Deployment", name)
    ]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})


def test_the_job_service_has_the_home_of_the_cluster(objects: list[dict[str, Any]]) -> None:
    found = {(document["kind"], document["metadata"]["name"]): document for document in objects}
    home = found["ConfigMap", "monge"]["data"]["MONGE_HOME"]
    pod = found["Deployment", "jobs"]["spec"]["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == home
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert claims[mount["name"]] == "monge-home"
    variables = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in pod["containers"][0]["env"]}
    assert variables == {"RAY_AUTH_TOKEN": {"name": "monge-ray", "key": "auth_token"}}


def test_the_cluster_is_that_of_compose(compose: dict[str, Any], objects: list[dict[str, Any]]) -> None:
    found = {(document["kind"], document["metadata"]["name"]): document for document in objects}
    settings = found["ConfigMap", "monge"]["data"]
    moved = {name: value.replace("monge-head-svc", "ray-head") for name, value in settings.items()}
    assert moved == compose["x-addresses"]

    ray = found["RayCluster", "monge"]["spec"]
    assert f"\nray=={ray['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    head = ray["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert [port["containerPort"] for port in head["ports"]] == [6379, 8265]
    offers = [
        group["groupName"]
        for group in ray["workerGroupSpecs"]
        if json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"'))).get("transport")
    ]
    assert offers == ["transport"]
    gateway = found["Deployment", "transport"]["spec"]["template"]["spec"]
    node, worker = (
        _parsed(gateway["initContainers"][0]["command"]),
        _parsed(compose["services"]["ray-worker"]["command"]),
    )
    assert node[0] == worker[0]
    assert node[1] == worker[1] | {"--address": "$(MONGE_RAY_ADDRESS)", "--num-cpus": "0"}


# Monitoring


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    known = (
        _samples(EndpointMetrics()) | _samples(TransportMetrics(lambda: 0, lambda: 0)) | _samples(JobMetrics(_NoJobs()))
    )
    asked: set[str] = set()
    dashboard = json.loads((INFRA / "grafana/dashboards/monge.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) >= len(dashboard["panels"]) > 0
    for target in targets:
        names = re.findall(r"monge_\w+", target["expr"])
        assert names, target
        for name in names:
            assert name in known, name
        labels = {label for name in names for label in known[name]}
        grouped = {
            label.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(",")
        }
        assert grouped <= labels, target
        for states in re.findall(r'\bstate=~"([^"]*)"', target["expr"]):
            assert set(states.split("|")) <= set(State), target
            asked |= set(states.split("|"))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouped, target
    assert asked == set(State)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_monitoring_reaches_the_services(compose: dict[str, Any]) -> None:
    services = compose["services"]
    scraped = yaml.safe_load((INFRA / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for static in job.get("static_configs", []) for target in static["targets"]]
    assert {target.split(":")[0] for target in targets} == {"transport", "endpoint", "jobs"}
    assert not any("metrics_path" in job for job in scraped), "all of ours is at /metrics"
    for target in targets:
        name, port = target.split(":")
        assert _parsed(services[name]["command"])[1]["--port"] == port
    discovery = scraped[-1]["file_sd_configs"][0]["files"][0]
    # Ray's list is an absolute link: it leads somewhere only where the volume has the path that it has for Ray.
    temporary = _parsed(services["ray-head"]["command"])[1]["--temp-dir"]
    assert Path(discovery).parent == Path(temporary)
    assert f"ray:{temporary}:ro" in services["prometheus"]["volumes"]

    provisioning = INFRA / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/monge.yml").read_text())["providers"]
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in services["grafana"]["volumes"])
    dashboard = json.loads((INFRA / "grafana/dashboards/monge.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}


# All of them


def test_images_are_pinned_and_name_no_registry(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        image = service["image"]
        assert image == "monge" or re.fullmatch(r"[a-z]+(/[a-z]+)?:[\w.-]*\d[\w.-]*", image), name


def test_hooks_are_those_of_make_lint() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe
    commands = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert not any(hook["pass_filenames"] for hook in repository["hooks"])


def _manifests() -> list[Path]:
    return [path for path in sorted(KUBERNETES.glob("*.yaml")) if path.name != "kustomization.yaml"]


def _pods(objects: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for document in objects:
        if document["kind"] == "Deployment":
            yield document, document["spec"]["template"]["spec"]
        elif document["kind"] == "RayCluster":
            for group in (document["spec"]["headGroupSpec"], *document["spec"]["workerGroupSpecs"]):
                yield document, group["template"]["spec"]


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def _parsed(command: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the program with its subcommands, and its options, written ``--a b``, ``--a=b`` or ``--a``."""
    program: list[str] = []
    options: dict[str, str] = {}
    latest = ""
    for word in command:
        if word.startswith("--"):
            latest, _, value = word.partition("=")
            assert latest not in options, f"{latest} twice"
            options[latest] = value
        elif latest:
            options[latest] = word
        else:
            program.append(word)
    return program, options


def _instructions(name: str) -> list[str]:
    """Return the arguments of all instructions of a name in the Dockerfile, without flags."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [re.sub(r"^(--\S+ )+", "", line.split(maxsplit=1)[1]) for line in lines if line.startswith(f"{name} ")]


def _samples(metrics: EndpointMetrics | TransportMetrics | JobMetrics) -> dict[str, set[str]]:
    """Return the names that Prometheus stores, with their labels."""
    # A metric has no samples before its labels have values; what a collector computes is no attribute, but has samples.
    labels = {
        metric._name: metric._labelnames for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)
    }
    registry: CollectorRegistry = metrics.registry
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {
        family.name + suffix: {
            *labels.get(family.name, [label for sample in family.samples for label in sample.labels]),
            *(["le"] if suffix == "_bucket" else []),
        }
        for family in registry.collect()
        for suffix in suffixes[family.type]
    }


class _NoJobs:
    def counts(self) -> dict[State, int]:
        return {}


def _secrets_of_readme() -> dict[str, set[str]]:
    """Return the secrets that the README tells a user to create, with their keys."""
    commands = (KUBERNETES / "README.md").read_text().replace("\\\n", "")
    return {
        name: set(re.findall(r"--from-literal=(\w+)=", literals))
        for name, literals in re.findall(r"create secret generic (\S+) (.*)", commands)
    }


def _assigns(line: str) -> bool:
    return "=" in line and not line.startswith("#")
