"""``monge demo``: all stages on cats and dogs, each with a required result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines.errors import MongeError, ServiceError
from pipelines.spec import JobSpec, load_spec
from services import examples
from services.jobs.client import Jobs
from services.jobs.follow import follow
from services.jobs.states import State
from services.locks import alone
from services.platform import local
from services.platform.processes import wait_until
from services.settings import Settings
from services.tracking.pages import EXPERIMENTS

SPECS: dict[str, tuple[str, ...]] = {
    "perceptron": ("perceptron.yaml", "train.evaluate_every=32000"),
    "mlp": ("mlp.yaml",),
    "lenet": ("lenet.yaml", "train.evaluate_every=24000"),
    "generator": ("transport-generator.yaml", "train.images=20000"),
    "paths": ("conditional-flow.yaml", "train.images=48000", "train.batch=64"),
}
"""Overrides for each config, to finish the demo within five minutes."""

ACCURACY_BARS = {"perceptron": 0.80, "mlp": 0.90, "lenet": 0.96}
GAP_BAR = 1e-5
"""Maximum relative duality gap of an exact plan, given float32 costs."""
HELD_OUT_OF_EACH_CLASS = 8
RIGHT_OF_HELD_OUT = 14
SAMPLES = 64
PATHS, PATH_STEPS = 8, 10
JUDGED_PATHS, RIGHT_OF_ENDS = 32, 44
"""Of the 64 ends of paths from cat to dog, the number that the trained LeNet must assign to the requested class:
three standard deviations above the result of a model that ignores classes."""


@dataclass
class DemoStage:
    """One stage in the summary."""

    name: str
    seconds: float
    ok: bool
    note: str = ""


@dataclass
class Summary:
    """Content of ``summary.json``."""

    stages: list[DemoStage] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    transport: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Any] = field(default_factory=dict)
    endpoint: dict[str, bool] = field(
        default_factory=lambda: {"predict_ok": False, "generate_ok": False, "path_ok": False}
    )


def run_demo(settings: Settings, console: Console, stop: bool) -> bool:
    """Run all stages; write figures and ``summary.json`` to ``demo/`` in the home folder.

    Args:
        settings: settings with the home folder.
        console: console for output.
        stop: whether to stop the platform afterwards.

    Returns:
        Whether all stages reached the required results.

    Raises:
        ServiceError: another demo is running in this home folder.
    """
    folder = settings.home / "demo"
    with alone(settings.home / "demo.lock", f"another `monge demo` is running in {settings.home}"):
        return _run(settings, console, folder, stop)


def _run(settings: Settings, console: Console, folder: Path, stop: bool) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    demo = _Demo(settings, console, folder)
    try:
        demo.run()
    except MongeError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
    finally:
        (folder / "summary.json").write_text(json.dumps(asdict(demo.summary), indent=2) + "\n")
        demo.show()
        if stop:
            local.down(settings.home, demo.say)
    return demo.passed


class _Demo:
    def __init__(self, settings: Settings, console: Console, folder: Path) -> None:
        self.home = settings.home
        self.console = console
        self.folder = folder
        self.summary = Summary()
        self.finished = False

    @property
    def passed(self) -> bool:
        return self.finished and all(stage.ok for stage in self.summary.stages)

    def say(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False, markup=False)

    def run(self) -> None:
        with self._stage("platform"):
            local.up(self.home, self.say)
        settings = Settings(home=self.home)
        jobs = Jobs(settings)
        with self._stage("jobs of an earlier demo"):
            self._cancel_leftovers(jobs)
        specs = {name: _spec(name) for name in SPECS}
        with self._stage("fetch and shard"):
            data = self._shard(specs["lenet"], settings)
        self._train(jobs, specs, settings)
        with self._stage("predict") as stage:
            stage.note, stage.ok = self._predict(settings, specs["lenet"], data)
            self.summary.endpoint["predict_ok"] = stage.ok
        with self._stage("generate") as stage:
            stage.note, stage.ok = self._generate(settings, specs["generator"])
            self.summary.endpoint["generate_ok"] = stage.ok
        with self._stage("paths from cat to dog") as stage:
            stage.note, stage.ok = self._paths(settings, specs["paths"], specs["lenet"])
            self.summary.endpoint["path_ok"] = stage.ok
        self.finished = True

    @contextmanager
    def _stage(self, name: str) -> Iterator[DemoStage]:
        self.console.rule(f"[bold]{name}", align="left", style="dim")
        stage = DemoStage(name, 0.0, True)
        self.summary.stages.append(stage)
        started = time.perf_counter()
        try:
            yield stage
        except BaseException:
            stage.ok = False
            raise
        finally:
            stage.seconds = round(time.perf_counter() - started, 1)
            self.console.print(f"  {'done' if stage.ok else 'fell short'} in {stage.seconds} s {stage.note}")

    def _cancel_leftovers(self, jobs: Jobs) -> None:
        names = {_spec(name).name for name in SPECS}
        for job in jobs.find(0, state=[state.value for state in State if not state.final]):
            if job.name in names:
                self.say(f"cancelling {job.id}, left over from an interrupted demo")
                jobs.cancel(job.id)

    def _shard(self, spec: JobSpec, settings: Settings) -> Path:
        from services.cluster import join_cluster

        join_cluster(settings)  # before Ray is imported: it reads its environment on import
        import ray

        from services.sharding.dataset import dataset_address, shard_dataset

        folder = Path(dataset_address(self.home, spec.data))
        try:
            manifest = shard_dataset(
                spec.data,
                folder,
                self.home / "cache",
                workers=2,
                on_progress=lambda done, total: self.say(f"sharded {done:,}/{total:,} images"),
            )
        finally:
            ray.shutdown()
        self.say(f"{manifest.images:,} images in {len(manifest.shards)} shards, {manifest.quarantined} skipped")
        return folder

    def _train(self, jobs: Jobs, specs: dict[str, JobSpec], settings: Settings) -> None:
        """Submit all jobs at once; the queue starts each when enough workers are free."""
        submitted = {name: jobs.submit(spec).id for name, spec in specs.items()}
        for name, job in submitted.items():
            with self._stage(f"train the {name}") as stage:
                follow(jobs, job, self.console)
                stage.note, stage.ok = self._judge(name, job, settings)

    def _judge(self, name: str, job: str, settings: Settings) -> tuple[str, bool]:
        from services.tracking.run import read_run

        generates = name not in ACCURACY_BARS
        record = read_run(settings.address("mlflow_uri"), job, ("plan_relative_gap",) if generates else ())
        latest = record.latest
        if not generates:
            accuracy = latest["test_accuracy"]
            self.summary.accuracy[name] = accuracy
            return f"accuracy {accuracy:.4f}, required {ACCURACY_BARS[name]}", accuracy >= ACCURACY_BARS[name]
        max_gap = max([*record.series["plan_relative_gap"], latest["test_transport_max_gap"]])
        found: dict[str, Any] = {
            "generator": latest["test_transport_cost"],
            "gaussian_baseline": latest["test_transport_cost_gaussian"],
            "real_images": latest["test_transport_cost_real"],
            "points": int(latest["test_transport_points"]),
            "solver": record.tags["transport_solver"],
            "max_gap": max_gap,
        }
        if name == "generator":
            self.summary.transport = found
        else:
            self.summary.paths = found
        note = (
            f"transport cost to held-out images {found['generator']:.1f}, Gaussian {found['gaussian_baseline']:.1f}, "
            f"gap ≤ {max_gap:.1e}"
        )
        # The generator minimises this cost. A flow need not lower it; its images are judged by classification.
        nearer = name != "generator" or found["generator"] < found["gaussian_baseline"]
        return note, nearer and max_gap <= GAP_BAR

    def _predict(self, settings: Settings, spec: JobSpec, data: Path) -> tuple[str, bool]:
        from pipelines.data.loader import open_dataset
        from pipelines.evaluation.figures import encode_png, image_grid, predictions_figure
        from services.serving.client import EndpointClient

        dataset = open_dataset(data)
        chosen = np.concatenate(
            [np.flatnonzero(dataset.test.labels == label)[:HELD_OUT_OF_EACH_CLASS] for label in (0, 1)]
        )
        images, labels = (tensor.numpy() for tensor in dataset.test.take(chosen))
        paths = []
        for place, (image, label) in enumerate(zip(images, labels, strict=True)):
            paths.append(self.folder / "held-out" / f"{dataset.classes[label]}-{place}.png")
            paths[-1].parent.mkdir(exist_ok=True)
            paths[-1].write_bytes(encode_png(image_grid(image[None], border=0)))
        with EndpointClient(settings.address("endpoint_url"), secret=settings.secret) as endpoint:
            _await_model(endpoint, spec.registered.name)
            answers = endpoint.predict(spec.registered.name, paths)
        probabilities = np.array([[answer.probabilities[name] for name in dataset.classes] for answer in answers])
        figure = predictions_figure(images, probabilities, dataset.classes, labels)
        (self.folder / "predictions.png").write_bytes(encode_png(figure))
        right = int((probabilities.argmax(1) == labels).sum())
        return f"{right} of {len(labels)} correct, required {RIGHT_OF_HELD_OUT}", right >= RIGHT_OF_HELD_OUT

    def _generate(self, settings: Settings, spec: JobSpec) -> tuple[str, bool]:
        from PIL import Image

        from services.serving.client import EndpointClient

        with EndpointClient(settings.address("endpoint_url"), secret=settings.secret) as endpoint:
            _await_model(endpoint, spec.registered.name)
            out = endpoint.generate(spec.registered.name, SAMPLES, 0, self.folder / "samples.png")
        with Image.open(out) as picture:
            pixels = np.asarray(picture)
        # A collapsed generator, or one that returns noise or an empty image, has a smaller spread.
        return f"{pixels.shape[1]}×{pixels.shape[0]} pixels in {out.name}", bool(pixels.std() > 10)

    def _paths(self, settings: Settings, spec: JobSpec, judge: JobSpec) -> tuple[str, bool]:
        """Draw paths and classify their ends with the LeNet."""
        from PIL import Image

        from services.serving.client import EndpointClient

        with EndpointClient(settings.address("endpoint_url"), secret=settings.secret) as endpoint:
            _await_model(endpoint, spec.registered.name)
            name = spec.registered.name
            out = endpoint.path(name, "cat", "dog", PATH_STEPS, PATHS, 0, self.folder / "cat-to-dog.png")
            both = endpoint.path(name, "cat", "dog", 2, JUDGED_PATHS, 0, self.folder / "paths" / "ends.png")
            ends = []
            with Image.open(both) as picture:
                pitch = (picture.width - 1) // 2
                for row in range(JUDGED_PATHS):
                    for column, label in enumerate(("cat", "dog")):
                        left, top = column * pitch + 1, row * pitch + 1
                        ends.append(self.folder / "paths" / f"{label}-{row}.png")
                        picture.crop((left, top, left + pitch - 1, top + pitch - 1)).save(ends[-1])
            answers = endpoint.predict(judge.registered.name, ends)
        right = sum(Path(answer.path).name.startswith(answer.label) for answer in answers)
        self.summary.paths["ends_right"] = right
        return f"{right} of {len(ends)} ends correct, required {RIGHT_OF_ENDS}, in {out.name}", right >= RIGHT_OF_ENDS

    def show(self) -> None:
        """Print the summary table and the addresses."""
        table = Table("stage", "seconds", "", "result")
        for stage in self.summary.stages:
            table.add_row(stage.name, f"{stage.seconds:.1f}", "[green]✓[/]" if stage.ok else "[red]✗[/]", stage.note)
        table.add_row("total", f"{sum(stage.seconds for stage in self.summary.stages):.1f}", "", "")
        self.console.print(table)
        addresses = local.Platform.read(self.home).addresses
        pages = (("runs and models", "mlflow_uri", EXPERIMENTS), ("endpoint", "endpoint_url", "/docs"))
        for what, setting, page in pages:
            if setting in addresses:
                self.console.print(f"  {what}: {addresses[setting]}{page}", highlight=False)
        self.console.print(f"  figures and summary.json: {self.folder}", highlight=False, soft_wrap=True)


def _spec(name: str) -> JobSpec:
    file, *shorter = SPECS[name]
    return load_spec(examples.folder() / file, shorter)


def _await_model(endpoint: Any, name: str) -> None:
    def known() -> bool:
        return any(model["name"] == name for model in endpoint.models())

    if not wait_until(known, timeout=30):
        raise ServiceError(f"the endpoint does not list model {name}", hint="see logs/endpoint.log")
