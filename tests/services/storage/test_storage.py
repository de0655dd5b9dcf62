"""Folders and buckets have the same semantics; errors of a server name the object."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipelines.errors import ObjectNotFoundError, SpecError, StorageError
from services.settings import Settings
from services.storage import local, s3
from services.storage.objects import Storage, split_address
from services.storage.open import open_storage
from tests.services.storage.faults import FaultyServer

DATA = bytes(range(256)) * 40


def test_what_was_written_is_read(store: Storage) -> None:
    store.write("a/b c+é.bin", b"old")
    store.write("a/b c+é.bin", DATA)
    assert store.exists("a/b c+é.bin")
    assert store.size("a/b c+é.bin") == len(DATA)
    assert store.read("a/b c+é.bin") == DATA
    assert store.read("a/b c+é.bin", limit=len(DATA)) == DATA
    assert store.read_range("a/b c+é.bin", 10, 20) == DATA[10:20]
    assert store.read_range("a/b c+é.bin", len(DATA) - 3, len(DATA) + 9) == DATA[-3:]
    assert store.read_range("a/b c+é.bin", len(DATA), len(DATA) + 9) == b""
    with pytest.raises(StorageError, match=rf"b c\+é.bin: more than {len(DATA) - 1} bytes"):
        store.read("a/b c+é.bin", limit=len(DATA) - 1)


def test_what_was_deleted_is_gone(store: Storage) -> None:
    store.write("a/b", DATA)
    store.write("a/c", DATA)
    for _ in range(2):  # nothing there is no error
        store.delete("a/b")
        assert not store.exists("a/b")
    assert [found.key for page in store.pages() for found in page] == ["a/c"]
    with pytest.raises(StorageError, match=r"no empty, '\.' or '\.\.' part"):
        store.delete("../a/c")


def test_listing_by_pages_in_the_order_of_the_keys(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (local, s3):
        monkeypatch.setattr(module, "PAGE", 3)
    keys = ["a-b", "a.txt", "a/1", "a/2", "a/é/3", "a0", "b"]
    for key in reversed(keys):
        store.write(key, key.encode())
    pages = list(store.pages())
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [found.key for page in pages for found in page] == keys
    assert [found.size for page in pages for found in page] == [len(key.encode()) for key in keys]
    assert [found.key for page in store.pages("a/") for found in page] == ["a/1", "a/2", "a/é/3"]
    assert list(store.pages("none")) == []
    before = pages[0][0].version
    store.write("a-b", b"xyz")
    assert next(store.pages())[0].version != before


def test_what_is_absent_is_named(store: Storage) -> None:
    store.write("here", b"1")
    assert not store.exists("tom.png")
    for ask in (store.read, store.size, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectNotFoundError, match=r"tom\.png"):
            ask("tom.png")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../out", "a/../../out", "a//b", "a/", "a\0b"])
def test_keys_stay_below_the_root(store: Storage, key: str) -> None:
    with pytest.raises(StorageError, match="key is relative"):
        store.write(key, b"1")
    with pytest.raises(StorageError, match="key is relative"):
        store.read(key)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 3), (0, 2**30 + 1)])
def test_ranges_have_a_beginning_and_a_limit(store: Storage, start: int, stop: int) -> None:
    with pytest.raises(StorageError, match="a range has"):
        store.read_range("a", start, stop)


def test_addresses(tmp_path: Path) -> None:
    assert split_address("s3://images") == ("images", "")
    assert split_address("s3://images/a/b/") == ("images", "a/b")
    assert open_storage("s3://images/a/", Settings()).address == "s3://images/a"
    assert open_storage(str(tmp_path), Settings()).address == str(tmp_path)
    for wrong in ("s3://", "s3:///a", "gs://images/a", "s3://host:9000/a"):
        with pytest.raises(SpecError, match="s3://bucket/prefix, received"):
            open_storage(wrong, Settings())
    with pytest.raises(SpecError, match="must not contain keys") as told:
        open_storage("s3://AKID:hidden@images/a", Settings())
    assert "hidden" not in str(told.value)


def test_a_store_is_sent_without_keys(settings: Settings) -> None:
    store = open_storage("s3://images/a", settings)
    store.write("x", DATA)
    sent = pickle.dumps(store)
    assert b"hidden-key" not in sent
    assert b"AKIDTEST" not in sent
    assert pickle.loads(sent).read("x") == DATA


@pytest.mark.parametrize("fault", [500, 503, "reset", "cut"])
def test_what_fails_once_is_asked_again(settings: Settings, server: FaultyServer, fault: int | str) -> None:
    store = open_storage("s3://images", settings)
    store.write("x", DATA)
    server.requests = 0
    server.faults.append(fault)
    assert store.read("x") == DATA
    assert server.requests == 2


@pytest.mark.parametrize(
    ("fault", "told", "hint", "requests"),
    [
        (403, "access is denied", "AWS_ACCESS_KEY_ID", 1),
        (404, "object not found", "MONGE_S3_ENDPOINT_URL", 1),
        (400, "rejects", "MONGE_S3", 1),
        (500, "failed 2 times", "MONGE_S3_ATTEMPTS", 2),
        ("reset", "no complete response in 2 attempts", "MONGE_S3_ENDPOINT_URL", 2),
        ("cut", "no complete response in 2 attempts", "MONGE_S3_ENDPOINT_URL", 2),
        ("slow", "no complete response in 2 attempts", "MONGE_S3_TIMEOUT", 2),
    ],
)
def test_what_goes_on_failing_is_told(
    settings: Settings, server: FaultyServer, fault: int | str, told: str, hint: str, requests: int
) -> None:
    store = open_storage("s3://images/a", settings.model_copy(update={"s3_timeout": 0.5}))
    store.write("tom.png", DATA)
    server.requests = 0
    server.faults.extend([fault] * 5)
    with pytest.raises(StorageError, match=rf"^s3://images/a/tom\.png: .*{told}") as error:
        store.read("tom.png")
    assert hint in (error.value.hint or "")
    assert server.requests == requests
    assert not any(secret in str(error.value) for secret in ("hidden-key", "AKIDTEST", "secret-of-the-server"))


def test_no_bucket_no_keys_no_profile_no_server(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ObjectNotFoundError, match="bucket 'absent' not found"):
        list(open_storage("s3://absent", settings).pages())
    nowhere = settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"})
    with pytest.raises(StorageError, match="no complete response"):
        open_storage("s3://images", nowhere).read("x")
    profile = settings.model_copy(update={"s3_profile": "unknown"})
    with pytest.raises(StorageError, match="no keys"):
        open_storage("s3://images", profile).read("x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="no keys"):
        open_storage("s3://images", settings).read("x")
