"""A source in S3 gives the same data set as the same files on disk."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.manifest import Manifest
from pipelines.errors import SourceError, StorageError
from pipelines.spec import DataSpec
from services.settings import Settings
from services.sharding import fetch
from services.sharding.dataset import dataset_address, shard_dataset
from services.storage.objects import StoredObject
from services.storage.open import open_storage
from services.storage.s3 import S3Storage
from tests.services.storage.faults import FaultyServer


@pytest.fixture(autouse=True)
def environment(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": server.url, "REGION": "us-east-1", "PATH_STYLE": "1", "ATTEMPTS": "2"}.items():
        monkeypatch.setenv(f"MONGE_S3_{name}", value)


def files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    found: dict[str, bytes] = {"notes.txt": b"not an image", ".hidden/x.png": b"", "cats/readme.md": b"cats"}
    for i in range(24):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)).save(buffer, "PNG")
        found[f"{('cats', 'dogs')[i % 2]}/{i:02d}.png"] = buffer.getvalue()
    return found | {"dogs/text.png": b"a text file"}


def upload(settings: Settings, address: str, objects: dict[str, bytes]) -> None:
    store = open_storage(address, settings)
    for key, data in objects.items():
        store.write(key, data)


def build(source: str, home: Path) -> tuple[Path, Manifest]:
    spec = DataSpec(source=source, size=8, channels=3)
    folder = Path(dataset_address(home, spec))
    return folder, shard_dataset(spec, folder, home / "cache", workers=0)


def test_a_prefix_is_the_folder_it_holds(settings: Settings, server: FaultyServer, tmp_path: Path) -> None:
    upload(settings, "s3://images/pets", files())
    upload(settings, str(tmp_path / "pets"), files())
    folder, manifest = build("s3://images/pets", tmp_path / "home")
    expected = build(str(tmp_path / "pets"), tmp_path / "home")[1]
    assert folder.name.startswith("pets-")
    assert manifest.name == "s3://images/pets"
    assert manifest.quarantined == 1
    same = {"name", "fingerprint"}
    assert manifest.model_dump(exclude=same) == expected.model_dump(exclude=same)
    # Only the listing is requested again, and a new copy with other times is the same data set.
    server.requests = 0
    assert build("s3://images/pets", tmp_path / "home")[0] == folder
    assert server.requests == 2
    upload(settings, "s3://images/pets", {"cats/00.png": files()["cats/02.png"]})
    assert build("s3://images/pets", tmp_path / "home")[0] != folder


def test_a_fetch_goes_on_where_it_stopped(settings: Settings, server: FaultyServer, tmp_path: Path) -> None:
    upload(settings, "s3://images/pets", files())
    server.requests = 0
    folder = dataset_address(tmp_path / "home", DataSpec(source="s3://images/pets", size=8, channels=3))
    whole = server.requests
    copies = sorted((tmp_path / "home" / "cache" / "s3").rglob("*.png"))
    copies[3].unlink()
    server.requests = 0
    server.faults.append(500)
    assert build("s3://images/pets", tmp_path / "home")[0] == Path(folder)
    assert server.requests < whole


def test_what_is_refused_names_the_object(settings: Settings, server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="s3://images/none: no objects"):
        build("s3://images/none", tmp_path)
    with pytest.raises(SourceError, match=r"s3://images/none\.npz: object not found"):
        build("s3://images/none.npz", tmp_path)
    server.faults.append(403)
    with pytest.raises(StorageError, match="s3://images/pets: access is denied"):
        build("s3://images/pets", tmp_path)


def test_arrays(settings: Settings, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(buffer, images=images, labels=np.arange(20) % 2)
    upload(settings, "s3://images/arrays", {"some.npz": buffer.getvalue()})
    assert build("s3://images/arrays/some.npz", tmp_path)[1].images == 20


def test_no_key_leads_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        address = "s3://images/pets"

        def pages(self, prefix: str = "") -> Iterator[list[StoredObject]]:
            yield [StoredObject("../../../evil.txt", 0, "1")]

    monkeypatch.setattr(fetch, "open_storage", lambda address, settings: Hostile())
    with pytest.raises(StorageError, match=r"no empty, '\.' or '\.\.' part: received '../../../evil.txt'"):
        fetch.local(DataSpec(source="s3://images/pets"), tmp_path / "home" / "cache")
    assert not list(tmp_path.rglob("evil.txt"))


def packed() -> bytes:
    """Return the images of :func:`files` as a tar file in the WebDataset layout."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files().items():
            if name.endswith(".png") and not name.startswith("."):
                stem = name.removesuffix(".png")
                for member, content in ((name, data), (f"{stem}.cls", stem.partition("/")[0].encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_large_object_goes_on_where_it_stopped(
    settings: Settings, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = packed()
    monkeypatch.setattr(fetch, "_PART", len(data) // 5)
    upload(settings, "s3://images/tars", {"all.tar": data})
    asked: list[int] = []
    original = S3Storage.read_range

    def read_range(self: S3Storage, key: str, start: int, stop: int, version: str | None = None) -> bytes:
        asked.append(start)
        if len(asked) == 4:
            server.faults.extend([500] * 2)
        return original(self, key, start, stop, version)

    monkeypatch.setattr(S3Storage, "read_range", read_range)
    with pytest.raises(StorageError, match=r"s3://images/tars/all\.tar: the server failed"):
        build("s3://images/tars/all.tar", tmp_path)
    manifest = build("s3://images/tars/all.tar", tmp_path)[1]
    assert (manifest.images, manifest.quarantined, manifest.classes) == (24, 1, ("cats", "dogs"))
    part = len(data) // 5
    assert asked == [0, part, 2 * part, 3 * part, *range(3 * part, len(data), part)]
    assert not list(tmp_path.rglob("*.part"))
    assert build("s3://images/tars", tmp_path)[1].images == 24


def test_tables_in_s3(settings: Settings, tmp_path: Path) -> None:
    objects = {name.replace("/", "-"): data for name, data in files().items() if name[:4] in ("cats", "dogs")}
    rows = "".join(f"{name},{name[:4]}\n" for name in objects if name.endswith(".png"))
    upload(settings, "s3://images/flat", objects | {"labels.csv": f"file_name,label\n{rows}".encode()})
    manifest = build("s3://images/flat", tmp_path)[1]
    assert (manifest.images, manifest.quarantined, manifest.classes) == (24, 1, ("cats", "dogs"))


def test_an_object_that_changes_meanwhile_is_not_mixed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(settings, "s3://images/tars", {"all.tar": packed()})
    original = S3Storage.read_range

    def read_range(self: S3Storage, key: str, start: int, stop: int, version: str | None = None) -> bytes:
        self.write(key, packed() + bytes(1024))
        return original(self, key, start, stop, version)

    monkeypatch.setattr(S3Storage, "read_range", read_range)
    with pytest.raises(StorageError, match=r"all\.tar: changed since it was listed"):
        build("s3://images/tars/all.tar", tmp_path)
