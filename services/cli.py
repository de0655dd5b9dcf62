"""The ``monge`` command."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipelines.errors import MongeError
from services.jobs.commands import app as job_commands
from services.settings import LOOPBACK, load_settings
from services.terminal import console, errors, say

app = typer.Typer(
    name="monge",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Train image models on a Ray cluster, watch them in MLflow, call them behind an endpoint.\n\n"
    "Start with `monge up`, then `monge submit configs/lenet.yaml --follow`; `monge init` copies the example specs "
    "into `configs/`. Add `--debug` to any command for the traceback of an error.",
)
transport = typer.Typer(no_args_is_help=True, help="Run the optimal-transport service, or verify its plans.")
app.add_typer(transport, name="transport")
node = typer.Typer(no_args_is_help=True, help="Join this machine to the cluster of another one.")
app.add_typer(node, name="node")
app.add_typer(job_commands)


def main() -> None:
    """Entry point: print an error as one readable message, with a traceback if ``--debug`` is given."""
    debug = "--debug" in sys.argv
    try:
        app(args=[argument for argument in sys.argv[1:] if argument != "--debug"], prog_name="monge")
    except MongeError as error:
        if debug:
            traceback.print_exc()
        errors.print("error:", style="bold red", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise SystemExit(130) from None


# The commands import what they need when they run: `monge --help` must not wait for Ray, torch and MLflow.


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to copy them to.")] = Path("configs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace files that differ.")] = False,
) -> None:
    """Copy the example job specs into a folder, with the JSON schema that gives an editor completion."""
    from services import examples

    copied = examples.copy(folder, overwrite)
    say(f"{len(copied)} job specs in {folder}/; start with: monge submit {folder / 'lenet.yaml'} --follow")


@app.command()
def up(
    cpus: Annotated[int | None, typer.Option(help="CPUs for jobs; all by default.")] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address of this machine that all services listen on, so that other machines can join. Kept for later "
            "calls; 127.0.0.1 at first.",
        ),
    ] = None,
) -> None:
    """Start the platform: Ray, the MLflow server, the job service, the transport service and the model endpoint."""
    from services.http import is_loopback
    from services.platform import local

    settings = load_settings()
    platform = local.up(settings.home, say, cpus, host, settings.storage)
    _show_status()
    if not is_loopback(local.kept_host(settings.home)):
        for line in local.advice(settings.home, platform):
            say(line)


@app.command()
def down() -> None:
    """Stop the local platform; data, runs, models and checkpoints are kept."""
    from services.platform import local

    if not local.down(load_settings().home, say):
        say("nothing was running")


@app.command()
def status() -> None:
    """Show which services run, where, and whether they answer."""
    raise typer.Exit(0 if _show_status() else 1)


def _show_status() -> bool:
    from services.platform import local

    table = Table("service", "url", "health", "runs")
    found = local.status(load_settings())
    for service in found:
        health = "[green]answers[/]" if service.healthy else "[red]down[/]" if service.pid is None else "[red]silent[/]"
        where = f"set by {service.named_by}" if service.named_by else f"here, pid {service.pid}"
        table.add_row(service.name, service.url or "", health, where if service.named_by or service.pid else "")
    console.print(table)
    return all(service.healthy for service in found)


@app.command()
def sweep(
    spec: Annotated[Path, typer.Argument(help="A job spec in YAML, such as configs/lenet.yaml.")],
    grid: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=[VALUE,…]",
            help='Values of a field to try, such as "model.dropout=[0, 0.5]". Repeat it to try all combinations. '
            "Values of `seed` are repetitions: the table shows their mean and spread.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field in all runs, such as train.images=20000."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric to compare; repeatable. Default: test_accuracy, or test_transport_cost for generators."
        ),
    ] = None,
    curves: Annotated[
        bool, typer.Option("--curves", metavar="", help="Plot metrics against images seen instead of the first field.")
    ] = False,
    out: Annotated[Path, typer.Option(help="PNG file to write, with a .json of the numbers next to it.")] = Path(
        "sweep.png"
    ),
) -> None:
    """Train a grid of specs on the cluster with Ray Tune: one parent MLflow run, one child run per point."""
    from services.cluster import ray_environment
    from services.jobs.paths import with_absolute_paths
    from services.tuning.grid import read_grid

    settings = load_settings()
    os.environ.update(ray_environment(settings))  # Ray reads it on import
    points = read_grid(spec, overrides or (), grid, with_absolute_paths)
    from services.tuning.show import show_sweep

    show_sweep(points, metric or (), curves, out, settings, console)


@app.command()
def shard(
    source: Annotated[
        str,
        typer.Argument(
            help="As data.source in a job spec: a folder, a tar file, s3://bucket/prefix, or a built-in name."
        ),
    ],
    destination: Annotated[str, typer.Argument(help="New folder, or s3://bucket/prefix.")],
    size: Annotated[
        int | None, typer.Option(help="Side of the square images in pixels; that of the source by default.")
    ] = None,
    channels: Annotated[int, typer.Option(help="1 for grey, 3 for colour.")] = 1,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set another field of the data section of a spec, such as drop_twins=true.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of concurrent Ray tasks; one per CPU by default. 0 shards in this process, without Ray."
        ),
    ] = None,
    shard_mib: Annotated[
        int | None,
        typer.Option(
            min=1, max=512, help="Maximum size of a shard in MiB of pixels; a task needs four times as much memory."
        ),
    ] = None,
    unique: Annotated[
        bool, typer.Option("--unique", metavar="", help="Keep only the first of identical images (data.drop_twins).")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", metavar="", help="Delete what an earlier `monge shard` wrote to DESTINATION.")
    ] = False,
) -> None:
    """Convert images into a sharded data set that jobs can use as their data.source.

    Images are decoded, cropped to a square, resized, hashed and split. Unreadable files are skipped and listed. If the
    command is interrupted, run it again: it continues, and writes the same bytes. If the data set is complete, it
    checks the hash of every shard and rewrites damaged ones.
    """
    from services.cluster import ray_environment

    settings = load_settings()
    os.environ.update(ray_environment(settings))  # Ray reads it on import
    from pipelines.spec import parse_data
    from services.sharding.show import show_sharding

    document = {"source": source, "size": size, "channels": channels} | ({"drop_twins": True} if unique else {})
    data = parse_data(document, overrides or ())
    shard_bytes = None if shard_mib is None else shard_mib * 2**20
    show_sharding(data, destination, settings, console, workers, shard_bytes, restart)


@app.command()
def couple(
    spec: Annotated[Path, typer.Argument(help="A job spec in YAML; only its data section is used.")],
    out: Annotated[Path, typer.Option(help="File to write; a flow reads it as objective.coupling.file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as data.source=digits; repeatable."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Noise vectors per image, one for each epoch.")] = 4,
    pool: Annotated[
        int, typer.Option(min=1, max=65536, help="Maximum number of points on each side of a plan.")
    ] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same pairs.")] = 0,
    condition_weight: Annotated[
        float, typer.Option(min=0, help="For a conditional flow: extra cost of pairs across classes, such as 10000.")
    ] = 0.0,
) -> None:
    """Pair noise with a whole data set by optimal plans, for flows to train on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pipelines.spec import load_spec
    from services.cluster import ray_environment
    from services.jobs.paths import with_absolute_paths

    settings = load_settings()
    os.environ.update(ray_environment(settings))  # Ray reads it on import
    from services.jobs.couple import couple as couple_dataset

    resolved = with_absolute_paths(load_spec(spec, overrides or ()))
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, total=None) for name in ("images sharded", "pairs coupled")}

        def on(name: str) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(bars[name], completed=done, total=total)

        coupling = couple_dataset(
            resolved.data,
            settings,
            rounds,
            pool,
            seed,
            condition_weight,
            on("images sharded"),
            on("pairs coupled"),
        )
    coupling.write(out)
    say(f"mean cost of a pair {coupling.costs.mean():.2f}, largest relative gap of a plan {coupling.max_gap:.1e}")
    say(f"wrote {out} ({out.stat().st_size / 2**10:,.0f} KiB)")


@app.command()
def models() -> None:
    """List the registered models, their aliases and latest versions."""
    from services.tracking.registry import list_models

    table = Table("model", "latest version", "aliases")
    for model in list_models(load_settings().address("mlflow_uri")):
        aliases = ", ".join(f"{alias} → {version}" for alias, version in model.aliases.items())
        table.add_row(model.name, str(model.latest), aliases)
    console.print(table)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP files.")],
    model: Annotated[str, typer.Option(help="NAME, NAME@ALIAS or NAME/VERSION.")],
) -> None:
    """Classify images with a model behind the endpoint."""
    from services.serving.client import EndpointClient

    table = Table("image", "class", "probability", "version")
    settings = load_settings()
    with EndpointClient(settings.address("endpoint_url"), secret=settings.secret) as endpoint:
        for prediction in endpoint.predict(model, images):
            table.add_row(
                str(prediction.path), prediction.label, f"{prediction.probability:.3f}", str(prediction.version)
            )
    console.print(table)


Truncation = typer.Option(
    min=0.001,
    max=100,
    help="Maximum absolute value of latent coordinates. Lower values give more typical, less varied samples.",
)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="NAME, NAME@ALIAS or NAME/VERSION.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("grid.png"),
    count: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same samples.")] = 0,
    label: Annotated[str | None, typer.Option("--class", help="Class to sample; conditional models only.")] = None,
    truncation: Annotated[float | None, Truncation] = None,
) -> None:
    """Sample from a generator behind the endpoint and save a grid of images."""
    from services.serving.client import EndpointClient

    settings = load_settings()
    with EndpointClient(settings.address("endpoint_url"), secret=settings.secret) as endpoint:
        say(f"wrote {endpoint.generate(model, count, seed, out, label, truncation)}")


@app.command()
def path(
    model: Annotated[str, typer.Option(help="NAME, NAME@ALIAS or NAME/VERSION of a conditional generator.")],
    start: Annotated[str, typer.Option("--from", help="Class at the start of each path.")],
    end: Annotated[str, typer.Option("--to", help="Class at the end of each path.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("path.png"),
    steps: Annotated[int, typer.Option(min=2, help="Images per path, including both ends.")] = 8,
    count: Annotated[int, typer.Option(min=1, help="Number of paths, one per row.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same paths.")] = 0,
    truncation: Annotated[float | None, Truncation] = None,
) -> None:
    """Interpolate between two classes and save the images, one path per row."""
    from services.serving.client import EndpointClient

    settings = load_settings()
    with EndpointClient(settings.address("endpoint_url"), secret=settings.secret) as endpoint:
        say(f"wrote {endpoint.path(model, start, end, steps, count, seed, out, truncation)}")


@app.command()
def doctor() -> None:
    """Check the installation and the services, and show how to fix what is wrong."""
    from services.platform.doctor import check_machine

    table = Table("what", "found", "hint")
    findings = check_machine(load_settings())
    for finding in findings:
        mark = "[green]✓[/]" if finding.ok else "[red]✗[/]"
        table.add_row(f"{mark} {finding.what}", finding.found, finding.hint)
    console.print(table)
    raise typer.Exit(0 if all(finding.ok or finding.optional for finding in findings) else 1)


@app.command()
def demo(
    stop: Annotated[bool, typer.Option("--stop", metavar="", help="Stop the platform afterwards.")] = False,
) -> None:
    """Run everything on cats and dogs: download, shard, train five models, register, serve, call."""
    from services.platform.demo import run_demo

    raise typer.Exit(0 if run_demo(load_settings(), console, stop) else 1)


@app.command()
def schema() -> None:
    """Print the JSON schema of job specs, for completion in editors."""
    from pipelines.spec import json_schema

    print(json_schema(), end="")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = LOOPBACK,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve all registered models in this process; `monge up` starts this for you."""
    from services.serving.server import serve as serve_models

    serve_models(host, port)


@node.command("join")
def node_join(
    url: Annotated[str, typer.Argument(help="URL of the head's job service, such as http://10.0.0.1:8200.")],
    token: Annotated[
        str | None, typer.Option(help="Admin token. Set MONGE_TOKEN instead if other users can see command lines.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=0, help="CPUs for jobs; all by default.")] = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Address of this machine; by default the one that reaches the head."),
    ] = None,
) -> None:
    """Join the cluster that `monge up --host` started on another machine, until Ctrl-C or SIGTERM.

    Both machines must see the head's home folder under the same path, unless the head sets MONGE_STORAGE. After a
    crash, or if the head was unreachable, the node joins again; after a drain it does not.
    """
    from pydantic import SecretStr

    from services.platform.nodes import join

    known = {"jobs_url": url} | ({} if token is None else {"token": SecretStr(token)})
    join(load_settings().model_copy(update=known), say, cpus, host)


@transport.command("serve")
def transport_serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = LOOPBACK,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8100,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that solves the plans.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Number of solver processes on the cluster.")] = 1,
    most: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of replicas while problems wait; --replicas by default.")
    ] = None,
) -> None:
    """Solve transport plans over HTTP: in this process, or on a Ray cluster."""
    from services.transport.server import serve as serve_plans

    serve_plans(host, port, ray, replicas, most=most)


@transport.command("verify")
def transport_verify(
    problem: Annotated[Path, typer.Argument(help="Body of a request to POST /v1/plans, .json or .npz.")],
    plan: Annotated[Path, typer.Argument(help="Body of its answer, with ?potentials=true.")],
) -> None:
    """Verify the certificate of a plan from the problem alone, without the service.

    Example: monge transport verify problem.json plan.json
    """
    from services.transport.verify import verify_files

    found = verify_files(problem, plan)
    print(f"verified: the plan of {found.solver} costs at most {found.primal:.12g}")
    print(f"no plan costs less than {found.dual:.12g}")
    print(f"gap {found.gap:.3g} ({found.relative_gap:.1e} of the cost), marginal error {found.marginal_error:.3g}")


if __name__ == "__main__":
    main()
