"""The commands of ``monge`` for jobs; they use only the job service."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from services import terminal
from services.settings import load_settings
from services.terminal import say

if TYPE_CHECKING:
    from services.jobs.client import Jobs
    from services.jobs.documents import JobProgress

app = typer.Typer()
token = typer.Typer(no_args_is_help=True, help="Manage tokens of the job service: who may read, submit and administer.")
app.add_typer(token, name="token")

COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "recovering": "magenta"}

JobId = Annotated[str, typer.Argument(help="Job id, as `monge jobs` shows it.")]


# The commands import what they need when they run: `monge --help` must not wait for it.


@app.command()
def submit(
    spec: Annotated[Path, typer.Argument(help="A job spec in YAML, such as configs/lenet.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a field of the spec, such as train.images=20000; repeatable."
        ),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="JOB[@IMAGES]",
            help="Start from the last checkpoint of a finished job, or from its checkpoint after IMAGES images.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Print the resolved spec without submitting.")
    ] = False,
    ask: Annotated[bool, typer.Option("--ask", metavar="", help="Ask for confirmation after the summary.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", metavar="", help="Show progress until the job ends.")
    ] = False,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Jobs with higher priority start first.")] = 0,
    timeout: Annotated[float | None, typer.Option(help="Time limit in seconds, from the first start.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="Label to find the job by; repeatable.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", metavar="", help="Queue the job even if the cluster is too small for it now.")
    ] = False,
) -> None:
    """Submit a training job.

    Requires a running platform (`monge up`), except with --dry-run. The spec is checked first, and a summary is
    printed: the data, the size of the network, and the workers. Nothing is submitted if a folder does not exist, a name
    is unknown, or the images or the cluster are too small.

    With --from, the new job continues another one: `monge submit SPEC --from JOB --set train.images=200000`. The number
    of images, the learning rate, the batch and the data may differ; networks and optimizer must be the same.
    """
    from pipelines.spec import load_spec
    from services.jobs.client import Jobs
    from services.jobs.paths import with_absolute_paths

    resolved = with_absolute_paths(load_spec(spec, overrides or ()))
    if dry_run:
        terminal.console.print(resolved.to_yaml(), markup=False, highlight=False, end="", soft_wrap=True)
        return
    named = dict(_label(label) for label in labels or ())
    with Jobs(load_settings()) as jobs:
        for line in jobs.plan(resolved, wait=wait, origin=origin).lines:
            say(line)
        if ask and not typer.confirm("  submit it?", default=True):
            raise typer.Exit(1)
        key = secrets.token_hex(16)
        job = jobs.submit(
            resolved, priority=priority, timeout=timeout, labels=named, wait=wait, key=key, origin=origin
        ).id
        terminal.console.print(f"submitted [bold]{job}[/]", highlight=False)
        if follow:
            _follow(jobs, job)
        else:
            say(f"follow it with: monge logs {job} --follow")


def _follow(jobs: Jobs, job: str) -> None:
    from services.jobs.follow import follow

    try:
        follow(jobs, job, terminal.console)
    except KeyboardInterrupt:
        say(f"job {job} continues")
        say(f"follow it with: monge logs {job} --follow")
        say(f"stop it with: monge cancel {job}")
        raise SystemExit(130) from None


def _label(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, as in team=vision", param_hint="--label")
    return name, value


@app.command()
def jobs(
    job: Annotated[str | None, typer.Argument(help="Show the history of this job; list all jobs by default.")] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(help="Only jobs in this state (see the column `state`); repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Maximum number of jobs; 0 for all.")] = 50,
) -> None:
    """List jobs, newest first, or show the history of one."""
    from services.jobs.client import Jobs

    with Jobs(load_settings()) as service:
        if job is not None:
            _tell(service, job)
            return
        found = service.find(limit, **({"state": state} if state else {}))
    # A long id wraps on a terminal; elsewhere each job is one line.
    table = Table(
        Column("job", overflow="fold", ratio=3),
        Column("state", no_wrap=True),
        Column("images", no_wrap=True),
        Column("why", overflow="fold", ratio=4),
        expand=terminal.console.is_terminal,
    )
    for one in found:
        table.add_row(one.id, _coloured(one.state), _brief(one.progress), escape(one.reason.partition("\n")[0]))
    terminal.show_table(table)


def _tell(service: Jobs, job: str) -> None:
    found = service.get(job)
    table = Table.grid(padding=(0, 2))
    took = (found.ended or datetime.now(UTC)) - (found.started or found.submitted)
    rows: list[tuple[str, Any]] = [
        ("job", found.id),
        ("state", f"{_coloured(found.state)} since {_time(found.since)}"),
        ("why", escape(found.reason)),
        ("submitted", f"{_time(found.submitted)} by {found.owner}, priority {found.priority}"),
        (
            "ran",
            f"{_duration(took.total_seconds())} in {_count(found.attempts, 'attempt')}" if found.started else "not yet",
        ),
    ]
    if (progress := found.progress) is not None:
        rows.append(("progress", _whole(progress)))
        rows += [
            ("", f"{name} {value:.5g}") for name, value in progress.metrics.items() if not name.startswith("system")
        ]
    rows += [
        (name, value)
        for name, value in (("run", found.run_url), ("model", found.model), ("from", found.origin))
        if value
    ]
    rows += [("label", f"{name}={value}") for name, value in found.labels.items()]
    for row in rows:
        table.add_row(*row)
    terminal.show_table(table)
    history = Table("when (UTC)", "attempt", Column("what", overflow="fold"))
    for event in service.events(job):
        history.add_row(_time(event.at), str(event.attempt or ""), escape(event.text))
    terminal.show_table(history)


@app.command()
def logs(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", metavar="", help="Keep printing until the job ends.")
    ] = False,
) -> None:
    """Print the log of a job, all attempts in order."""
    from services.jobs.client import Jobs

    with Jobs(load_settings()) as service:
        for line in service.logs(job, follow):
            print(line, flush=True)


@app.command()
def cancel(job: JobId) -> None:
    """Stop a job and its workers; its MLflow run is marked KILLED."""
    from services.jobs.client import Jobs

    with Jobs(load_settings()) as service:
        service.cancel(job)
        ended = service.wait(job, timeout=120)
    say(f"{ended.id} is {ended.state.value}: {ended.reason}")


@app.command()
def retry(job: JobId) -> None:
    """Queue a failed or cancelled job again. It resumes from its last checkpoint, in the same MLflow run."""
    from services.jobs.client import Jobs

    with Jobs(load_settings()) as service:
        again = service.retry(job)
    say(f"{again.id} is {again.state.value}; follow it with: monge logs {again.id} --follow")


@app.command()
def cluster() -> None:
    """Show free resources, the jobs that hold workers, and why other jobs wait."""
    from services.jobs.client import Jobs

    with Jobs(load_settings()) as service:
        view = service.cluster()
    if view.away:
        say(f"the cluster is unreachable: {view.away}")
    say(f"{_count(len(view.nodes), 'node')}; `monge nodes` lists them")
    say(f"{view.free_cpus:g} of {view.cpus:g} CPUs and {view.free_gpus:g} of {view.gpus:g} GPUs are free")
    for holder in view.holding:
        say(f"{holder.job} holds {_count(holder.workers, holder.device.upper())}")
    for waiting in view.waiting:
        say(f"{waiting.job} waits: {waiting.reason}")


@app.command()
def nodes() -> None:
    """List the nodes of the cluster and their used resources; mark the head and draining nodes."""
    from services.jobs.client import Jobs

    with Jobs(load_settings()) as service:
        found = service.nodes()
    table = Table("node", "address", "CPUs used", "GPUs used", "")
    for node in found:
        state = ", ".join(word for word, holds in (("head", node.head), ("draining", node.draining)) if holds)
        table.add_row(
            node.id[:12], node.address, _used(node.used_cpus, node.cpus), _used(node.used_gpus, node.gpus), state
        )
    terminal.show_table(table)


def _used(used: float | None, total: float) -> str:
    return f"{total:g}" if used is None else f"{used:g} of {total:g}"


@app.command()
def drain(
    node: Annotated[
        str | None, typer.Argument(help="Drain only this node: its address or id, as `monge nodes` shows them.")
    ] = None,
    end: Annotated[
        bool,
        typer.Option(
            "--end",
            metavar="",
            help="Start jobs again; stopped jobs come first. Not for a node: Ray cannot undo a drain. Run "
            "`monge node join` on it instead.",
        ),
    ] = False,
) -> None:
    """Stop all jobs with a checkpoint and start no others, for maintenance. `monge drain --end` resumes them.

    With NODE, only that machine is drained: nothing new starts there, its workers save a checkpoint and stop, and their
    jobs resume on other nodes if there is room.
    """
    from services.jobs.client import Jobs

    if node is not None:
        if end:
            raise typer.BadParameter(
                "a drain of a node cannot be undone; run `monge node join` on the node again", param_hint="--end"
            )
        with Jobs(load_settings()) as service:
            drained = service.drain_node(node)
        say(f"{drained.address} is draining: it leaves the cluster after its workers have saved a checkpoint")
        return
    with Jobs(load_settings()) as service:
        view = service.drain(end)
    if end:
        say(f"jobs start again; {len(view.waiting)} waiting")
    else:
        say(f"no job starts until `monge drain --end`; {_count(len(view.holding), 'job')} to stop")


@token.command("create")
def token_create(
    name: Annotated[str, typer.Argument(help="Name of the user or service.")],
    role: Annotated[str, typer.Option(help="read, submit, admin, or call (the endpoint and the transport service).")],
) -> None:
    """Create a token and print it; it cannot be shown again. Users set MONGE_TOKEN to it."""
    from services.jobs.client import Jobs
    from services.tokens import Role

    if role not in list(Role):
        raise typer.BadParameter(f"{role!r} is not one of {', '.join(Role)}", param_hint="--role")
    with Jobs(load_settings()) as service:
        print(service.create_token(name, Role(role)).secret)


@token.command("list")
def token_list() -> None:
    """List all tokens, without their secrets."""
    from services.jobs.client import Jobs

    with Jobs(load_settings()) as service:
        found = service.tokens()
    table = Table("token", "role", "created (UTC)", "revoked (UTC)")
    for one in found:
        table.add_row(one.name, one.role.value, _time(one.created), _time(one.revoked) if one.revoked else "")
    terminal.show_table(table)


@token.command("revoke")
def token_revoke(name: Annotated[str, typer.Argument(help="As `monge token list` shows it.")]) -> None:
    """Revoke a token."""
    from services.jobs.client import Jobs

    with Jobs(load_settings()) as service:
        service.revoke_token(name)
    say(f"{name} is revoked")


def _coloured(state: str) -> str:
    return f"[{COLOURS.get(state, 'default')}]{state}[/]"


def _brief(progress: JobProgress | None) -> str:
    if progress is None or not progress.total:
        return ""
    return f"{min(100, 100 * progress.images // progress.total)}%"


def _whole(progress: JobProgress) -> str:
    parts = [f"{progress.images:,} of {progress.total:,} images"]
    if progress.images_per_second:
        parts.append(f"{progress.images_per_second:,.0f} images/s")
    if progress.seconds_left and progress.images < progress.total:
        parts.append(f"{_duration(progress.seconds_left)} left")
    return ", ".join(parts)


def _time(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
