"""pyarrow's S3 file system with the settings of Monge."""

from __future__ import annotations

import pickle
from pathlib import Path

import cloudpickle
import pytest

from pipelines.errors import StorageError
from services.settings import Settings
from services.storage.arrow import open_files
from services.storage.open import open_storage

ADDRESS = "s3://images/some/prefix"


def test_what_one_client_writes_the_other_reads(settings: Settings) -> None:
    files, path = open_files(ADDRESS, settings)
    with files.open_output_stream(f"{path}/a/b") as stream:
        stream.write(b"bytes")
    assert open_storage(ADDRESS, settings).read("a/b") == b"bytes"


def test_it_is_sent_without_keys(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = open_files(ADDRESS, settings)
    open_storage(ADDRESS, settings).write("a", b"bytes")
    for sent in (pickle.dumps(files), cloudpickle.dumps(files)):
        assert b"hidden-key" not in sent
        assert b"AKIDTEST" not in sent
        there = pickle.loads(sent)
        assert there == files
        with there.open_input_stream(f"{path}/a") as stream:
            assert stream.read() == b"bytes"
    assert "hidden-key" not in repr(files)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match="no keys for S3 found"):
        pickle.loads(pickle.dumps(files))


def test_a_folder_is_itself(tmp_path: Path) -> None:
    files, path = open_files(str(tmp_path), Settings())
    assert (files.type_name, path) == ("local", str(tmp_path))
