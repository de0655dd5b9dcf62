"""`monge shard`: to folders and buckets, after kills and damage, without overwriting other files."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from pipelines.data import arrays, shard
from pipelines.data.loader import open_dataset
from pipelines.data.manifest import read_manifest
from pipelines.errors import ShardError, SourceError, SpecError, StorageError
from pipelines.spec import DataSpec
from services.cli import app
from services.settings import Settings
from services.sharding import dataset, show
from services.sharding.dataset import dataset_address, shard_dataset
from services.storage.open import open_storage
from tests.services.storage.faults import FaultyServer

N = 40
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SHARD_IMAGES", 6)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Create forty images of two classes; the last is a copy of the first."""
    random = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for i in range(N):
        path = folder / ("ant", "bee")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "bee" / "39.png").write_bytes((folder / "ant" / "00.png").read_bytes())
    return folder


def spec_of(photos: Path | str, **fields: object) -> DataSpec:
    return DataSpec.model_validate({"source": str(photos), "size": 8, "channels": 3, **fields})


def build(
    photos: Path, destination: Path | str, *, restart: bool = False, shard_bytes: int | None = None, **fields: object
) -> list[int]:
    """Shard without Ray; return the numbers of images in the progress reports."""
    seen: list[int] = []
    shard_dataset(
        spec_of(photos, **fields), destination, photos.parent / "cache", 0,
        lambda done, total: seen.append(done), shard_bytes, restart, verify=True,
    )  # fmt: skip
    return seen


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != dataset.LOCK}


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Interrupt the next sharding after ``shards`` shards."""
    original, left = dataset.write_shard, [shards]

    def write(*arguments: object) -> object:
        if not left[0]:
            monkeypatch.setattr(dataset, "write_shard", original)
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*arguments)

    monkeypatch.setattr(dataset, "write_shard", write)


KILLED = """
import sys
from pathlib import Path
from pipelines.data import shard
from pipelines.spec import DataSpec
from services.sharding.dataset import shard_dataset

source, out, cache = sys.argv[1:]
shard.SHARD_IMAGES = 6
spec = DataSpec(source=source, size=8, channels=3)
shard_dataset(spec, Path(out), Path(cache), 0, lambda done, total: print(done, flush=True))
print("end", flush=True)
"""


@pytest.mark.parametrize("after", [1, 4])
def test_a_kill_at_any_moment_costs_one_shard(photos: Path, tmp_path: Path, after: int) -> None:
    build(photos, tmp_path / "whole")
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", KILLED, str(photos), str(out), str(tmp_path / "cache")]
    # A pipe that is not read on holds the writer within a line or two of where it is killed.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for _ in range(after + 1):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    (out / ".shard-00009.safetensors.0.tmp").write_bytes(b"what a kill leaves of a file")
    kept = {path.name: path.stat().st_ino for path in out.glob("shard-*")}
    assert len(kept) >= after
    build(photos, out)
    assert files(out) == files(tmp_path / "whole")
    # A shard whose receipt was not written before the kill is not known to be whole.
    assert sum(path.stat().st_ino != kept[path.name] for path in out.glob("shard-*") if path.name in kept) <= 1


def test_a_damaged_shard_of_a_finished_data_set_is_redone(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(photos, out)
    expected = files(out)
    path = out / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (out / "shard-00004.safetensors").unlink()
    before = (out / "shard-00000.safetensors").stat().st_ino
    assert build(photos, out) == [N]
    assert files(out) == expected
    assert (out / "shard-00000.safetensors").stat().st_ino == before
    path.write_bytes(b"")
    for images in (4, 1):
        with pytest.raises(ShardError, match=r"damaged, and cannot be reproduced .*: shard-00002(.|\n)*--shard-mib"):
            build(photos, out, shard_bytes=8 * 8 * 3 * images)
    build(photos, out)
    assert files(out) == expected
    (out / "index.safetensors").write_bytes(b"")
    with pytest.raises(ShardError, match=r"index.safetensors: its sha256 does not match the manifest(.|\n)*--restart"):
        build(photos, out)
    build(photos, out, restart=True)
    assert files(out) == expected


def test_a_source_that_changed_meanwhile_is_told(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        build(photos, out)
    with pytest.raises(ShardError, match=r"contains part of another sharding: size 8, now 7(.|\n)*--restart"):
        build(photos, out, size=7)
    with pytest.raises(ShardError, match=r"part of another sharding: drop_twins False, now True; shard_bytes"):
        build(photos, out, shard_bytes=2**20, drop_twins=True)
    Image.new("RGB", (9, 9), "red").save(photos / "ant" / "00.png")
    os.utime(photos / "ant" / "00.png", (1, 1))
    with pytest.raises(ShardError, match=r"photos has changed since(.|\n)*--restart"):
        build(photos, out)
    assert build(photos, out, restart=True)[0] == 0
    build(photos, tmp_path / "expected")
    assert files(out) == files(tmp_path / "expected")


def test_a_restart_leaves_no_shard_of_before(photos: Path, tmp_path: Path) -> None:
    build(photos, tmp_path / "out")
    build(photos, tmp_path / "few", shard_bytes=8 * 8 * 3 * 4 + 63)
    assert len(files(tmp_path / "few")) == 10 + 3
    build(photos, tmp_path / "few", restart=True)
    assert files(tmp_path / "few") == files(tmp_path / "out")
    with pytest.raises(ShardError, match=r"contains another data set, made from an earlier .*photos, 8 pixels wide"):
        build(photos, tmp_path / "out", size=9)


def test_nothing_is_written_beside_something_else(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    (other / "chapters").mkdir(parents=True)
    (other / "chapters" / "one.tex").write_text("…")
    for restart in (False, True):
        with pytest.raises(ShardError, match=r"thesis: contains other files, such as chapters/one.tex"):
            build(photos, other, restart=restart)
    assert [path.name for path in other.rglob("*") if path.name != dataset.LOCK] == ["chapters", "one.tex"]
    with pytest.raises(StorageError, match=r"one.tex: cannot be written"):
        build(photos, other / "chapters" / "one.tex")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_is_named_and_gone_on_with(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    left, sync = [5], os.fsync

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(arrays.os, "fsync", fsync)
    with pytest.raises(StorageError, match=rf"shard-00002.safetensors: {os.strerror(code)}(.|\n)*free space"):
        build(photos, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(shard, "SHARD_IMAGES", 6)
    assert build(photos, tmp_path / "out")[0] == 12
    build(photos, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_of_twins_the_first_is_kept(photos: Path, tmp_path: Path) -> None:
    build(photos, tmp_path / "all")
    build(photos, tmp_path / "once", drop_twins=True)
    manifest = read_manifest(tmp_path / "once")
    assert manifest.quarantined == 1
    assert manifest.fingerprint != read_manifest(tmp_path / "all").fingerprint
    told = json.loads((tmp_path / "once" / "quarantine.jsonl").read_text())
    assert told == {"name": "bee/39.png", "reason": "an image that is kept has its pixels"}
    held = open_dataset(tmp_path / "once")
    pixels = [
        image.numpy().tobytes() for part in (held.train, held.test) for image in part.take(np.arange(len(part)))[0]
    ]
    assert len(pixels) == len(set(pixels)) == N - 1
    assert sum(map(sum, (part.values() for part in manifest.counts.values()))) == N - 1


@pytest.fixture
def environment(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": server.url, "REGION": "us-east-1", "PATH_STYLE": "1", "ATTEMPTS": "2"}.items():
        monkeypatch.setenv(f"MONGE_S3_{name}", value)


def objects(settings: Settings, address: str) -> dict[str, bytes]:
    store = open_storage(address, settings)
    return {found.key: store.read(found.key) for page in store.pages() for found in page}


def test_into_a_bucket_and_out_of_it(
    photos: Path, tmp_path: Path, settings: Settings, server: FaultyServer, environment: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    address = "s3://images/made/here"
    build(photos, tmp_path / "whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        build(photos, address)
    with pytest.raises(SourceError, match="s3://images/made/here: an unfinished sharded data set"):
        dataset_address(tmp_path / "home", spec_of(address))
    open_storage(address, settings).write("shard-00001.safetensors", b"damaged")
    assert build(photos, address)[0] == 12
    expected = files(tmp_path / "whole")
    assert objects(settings, address) == expected
    open_storage(address, settings).write("shard-00004.safetensors", b"damaged")
    assert build(photos, address) == [N]
    assert objects(settings, address) == expected
    open_storage(address, settings).write("notes.txt", b"something else")
    with pytest.raises(ShardError, match=r"contains other files, such as notes.txt"):
        build(photos, address, restart=True)
    open_storage(address, settings).delete("notes.txt")

    spec = spec_of(address, size=None)
    assert dataset_address(tmp_path / "home", spec) == address
    manifest = shard_dataset(spec, address, tmp_path / "home" / "cache", workers=0)
    assert manifest.document() == expected["manifest.json"]
    with pytest.raises(SpecError, match="is already sharded"):
        shard_dataset(spec, "s3://images/elsewhere", tmp_path / "home" / "cache", workers=0)
    server.faults.extend([403] * 2)
    with pytest.raises(StorageError, match="access is denied"):
        build(photos, "s3://images/other")


def test_shards_are_a_source(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(photos, out)
    before = files(out)
    spec = spec_of(out, size=None)
    assert dataset_address(tmp_path / "home", spec) == str(out)
    seen: list[tuple[int, int]] = []
    manifest = shard_dataset(spec, out, tmp_path, 0, lambda done, total: seen.append((done, total)))
    assert manifest == read_manifest(out)
    assert seen == [(N, N)]
    for field, value in (("size", 16), ("channels", 1)):
        with pytest.raises(SpecError, match=rf"data.{field}: received {value}, but the shards in .* have"):
            shard_dataset(spec.model_copy(update={field: value}), out, tmp_path, 0)
    with pytest.raises(SpecError, match="is already sharded"):
        shard_dataset(spec, tmp_path / "again", tmp_path, 0)
    assert files(out) == before


def test_half_done_shards_are_no_source(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        build(photos, tmp_path / "out")
    with pytest.raises(SourceError, match=r"an unfinished sharded(.|\n)*continues where it stopped"):
        dataset_address(tmp_path / "home", spec_of(tmp_path / "out"))


def shown(photos: Path | str, destination: str, home: Path) -> str:
    console = Console(file=io.StringIO(), width=160)
    show.show_sharding(spec_of(photos), destination, Settings(home=home), console, workers=0)
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue()


def test_what_is_shown(photos: Path, tmp_path: Path) -> None:
    text = shown(photos, str(tmp_path / "out"), tmp_path / "home")
    assert re.search(r"images sharded .* 40/40 .* images/s", text)
    assert re.search(r"all +│ +32 +│ +8", text)
    assert "40 images of (3, 8, 8) in 7 shards" in text
    assert f"--set data.source={tmp_path / 'out'} --set data.channels=3" in text
    assert "40 images were already sharded" in shown(photos, str(tmp_path / "out"), tmp_path / "home")


def test_a_destination_within_its_source_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="is inside the source"):
        shown(photos, str(photos / "shards"), tmp_path / "home")
    with pytest.raises(ShardError, match="is inside the source"):
        shown("s3://images/pets/", "s3://images/pets/shards", tmp_path / "home")
    with pytest.raises(SpecError, match="must not contain keys"):
        show.absolute("s3://key:secret@images/pets")
    assert not list(photos.glob("shards"))


def test_the_command(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGE_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    arguments = ["shard", str(photos), str(out), "--workers", "0", "--channels", "3", "--size", "8", "--unique"]
    done = CliRunner().invoke(app, [*arguments, "--set", "test_fraction=0.5"], catch_exceptions=False)
    assert done.exit_code == 0
    manifest = read_manifest(out)
    assert (manifest.images, manifest.quarantined, manifest.image.dims) == (N, 1, (3, 8, 8))
    assert sum(manifest.counts["test"].values()) > 15
    with pytest.raises(ShardError, match=r"another data set(.|\n)*--restart"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    mib = ["--restart", "--shard-mib", "1", "--set", "validation_fraction=0.2"]
    assert CliRunner().invoke(app, [*arguments, *mib], catch_exceptions=False).exit_code == 0
    manifest = read_manifest(out)
    assert len(manifest.shards) == 1
    assert sum(manifest.counts["validation"].values()) > 4
    with pytest.raises(SpecError, match=r"sise: no such field .*; did you mean size\?"):
        CliRunner().invoke(app, [*arguments, "--set", "sise=3"], catch_exceptions=False)


@pytest.mark.slow
def test_the_command_brings_its_own_cluster(photos: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "MONGE_HOME": str(tmp_path / "home"), "NO_COLOR": "1", "COLUMNS": "160"}
    arguments = [sys.executable, "-m", "services.cli", "shard", str(photos), str(tmp_path / "out")]
    arguments += ["--size", "8", "--channels", "3", "--workers", "2"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "40 images of (3, 8, 8)" in done.stdout
    assert "Traceback" not in done.stderr
    assert read_manifest(tmp_path / "out").images == N
