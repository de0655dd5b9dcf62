"""Tar and Parquet files: their images, and validation of untrusted files."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.data.source import fingerprint, open_source
from pipelines.data.sources import parquet
from pipelines.errors import CorruptImageError, SourceError
from pipelines.spec import DataSpec

Encode = Callable[..., bytes]


def write_tar(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def images(encode: Encode, n: int) -> list[bytes]:
    return [encode(np.full((8, 8, 3), 20 * i, np.uint8), "WEBP" if i == 1 else "PNG") for i in range(n)]


def labels_of(path: Path, cache: Path) -> dict[str, str]:
    spec = DataSpec(source=str(path))
    source = open_source(spec, cache)
    assert source.fingerprint == fingerprint(spec)
    sent = pickle.loads(pickle.dumps(source))
    found = {}
    for i in range(len(source)):
        name, label, pixels = sent.item(i)
        assert pixels.shape == (1, 8, 8)
        found[name] = source.classes[label]
    return found


def faults_of(path: Path, cache: Path) -> dict[str, str]:
    source = open_source(DataSpec(source=str(path), size=8), cache)
    found = {}
    for i in range(len(source)):
        try:
            source.item(i)
        except CorruptImageError as error:
            found[source.name(i)] = str(error)
    return found


def test_tars(tmp_path: Path, encode: Encode) -> None:
    a, b, c, d = images(encode, 4)
    long = "x" * 300 + "é"
    write_tar(
        tmp_path / "r" / "0.tar", [("1.png", a), ("1.cls", b"7\n"), ("d/2.x.webp", b), ("d/2.json", b'{"label": 10}')]
    )
    write_tar(tmp_path / "r" / "1.tar", [(f"{long}.cls", b"10"), (f"{long}.PNG", c), ("1.cls", b"7"), ("1.png", d)])
    (tmp_path / "r" / "readme.txt").write_text("")
    expected = {"0.tar/1.png": "7", "0.tar/d/2.x.webp": "10", f"1.tar/{long}.PNG": "10", "1.tar/1.png": "7"}
    assert labels_of(tmp_path / "r", tmp_path) == expected
    assert open_source(DataSpec(source=str(tmp_path / "r")), tmp_path).classes == ("7", "10")
    assert labels_of(tmp_path / "r" / "0.tar", tmp_path) == {k: v for k, v in expected.items() if k[0] == "0"}


def test_the_split_of_archives(tmp_path: Path, encode: Encode) -> None:
    for i, (part, data) in enumerate(zip(("train-000", "train-001", "test-000"), images(encode, 3), strict=True)):
        write_tar(tmp_path / "r" / f"{part}.tar", [("0.png", data), ("0.cls", str(i % 2).encode())])
    source = open_source(DataSpec(source=str(tmp_path / "r")), tmp_path)
    split = source.official_split(0, 3)
    assert split is not None
    assert {source.name(i): int(split[i]) for i in range(3)} == {
        "test-000.tar/0.png": 1,
        "train-000.tar/0.png": 0,
        "train-001.tar/0.png": 0,
    }


def test_a_hostile_tar(tmp_path: Path, encode: Encode) -> None:
    good, other, *_ = images(encode, 2)
    link, hard, device = tarfile.TarInfo("l.png"), tarfile.TarInfo("h.png"), tarfile.TarInfo("dev.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "ok.png"
    device.type = tarfile.CHRTYPE
    members: list[tuple[str, bytes | tarfile.TarInfo]] = [
        ("ok.png", good), ("ok.cls", b"a"),
        ("../../evil.png", other), ("../../evil.cls", b"b"),
        ("l.png", link), ("l.cls", b"a"), ("h.png", hard), ("h.cls", b"a"), ("dev.png", device), ("dev.cls", b"b"),
        ("ok.png", other),
        ("ok.jpg", other),
        ("bare.png", good),
        ("huge.png", good), ("huge.cls", b"a" * 70_000),
        ("deep.png", good), ("deep.json", b"[" * 60_000),
        ("two.cls", b"a"), ("two.png", good), ("two.json", b'{"label": "b"}'),
    ]  # fmt: skip
    write_tar(tmp_path / "in" / "a.tar", members)
    assert faults_of(tmp_path / "in" / "a.tar", tmp_path / "cache") == {
        "a.tar/l.png": "not a plain file: links and special files in a tar file are not followed",
        "a.tar/h.png": "not a plain file: links and special files in a tar file are not followed",
        "a.tar/dev.png": "not a plain file: links and special files in a tar file are not followed",
        "a.tar/ok.png": "a.tar holds this name a second time",
        "a.tar/ok.jpg": "a second image of one sample, beside ok.png",
        "a.tar/two.png": "its sample has two different labels",
    } | {
        f"a.tar/{name}.png": "no readable label: a .cls, or a .json with a field label, of the same name is wanted"
        for name in ("bare", "huge", "deep")
    }
    assert not list(tmp_path.rglob("evil*"))


def test_tars_that_are_none(tmp_path: Path, encode: Encode) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [("1.cls", b"7"), ("1.png", images(encode, 1)[0] * 40)])
    whole = path.read_bytes()
    path.write_bytes(whole[:1900])
    with pytest.raises(SourceError, match=r"a.tar: not a whole tar file"):
        open_source(DataSpec(source=str(path)), tmp_path)
    path.write_bytes(b"a text file named .tar\n" * 100)
    with pytest.raises(SourceError, match=r"a.tar: not a whole tar file"):
        open_source(DataSpec(source=str(path)), tmp_path)
    write_tar(path, [("1.txt", b"7")])
    with pytest.raises(SourceError, match="no labelled image"):
        open_source(DataSpec(source=str(path)), tmp_path)


def test_a_tar_whose_header_claims_more_than_a_header_may(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(SourceError, match="over the limit of 1048576"):
        open_source(DataSpec(source=str(tmp_path / "a.tar")), tmp_path)


def write_parquet(path: Path, columns: dict[str, pa.Array], names: list[str] | None = None, rows: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=rows)


def structs(data: list[bytes | None]) -> pa.Array:
    return pa.array([{"bytes": item, "path": "/etc/passwd"} for item in data])


def test_parquets(tmp_path: Path, encode: Encode) -> None:
    data = images(encode, 5)
    column = {"image": structs(data[:3]), "label": pa.array([1, 0, 1])}
    write_parquet(tmp_path / "hf" / "data" / "train-0.parquet", column, ["no", "yes"])
    column = {"image": structs(data[3:]), "label": pa.array([1, 0])}
    write_parquet(tmp_path / "hf" / "data" / "test-0.parquet", column, ["no", "yes"])
    assert labels_of(tmp_path / "hf", tmp_path) == {
        "data/test-0.parquet[0]": "yes",
        "data/test-0.parquet[1]": "no",
        "data/train-0.parquet[0]": "yes",
        "data/train-0.parquet[1]": "no",
        "data/train-0.parquet[2]": "yes",
    }
    split = open_source(DataSpec(source=str(tmp_path / "hf")), tmp_path).official_split(0, 5)
    assert split is not None
    assert split.tolist() == [1, 1, 0, 0, 0]
    write_parquet(
        tmp_path / "b.parquet", {"img": pa.array(data), "thumb": pa.array(data), "class": pa.array(list("baabc"))}
    )
    assert list(labels_of(tmp_path / "b.parquet", tmp_path).values()) == list("baabc")


def test_rows_that_cannot_be_used(tmp_path: Path, encode: Encode) -> None:
    data = images(encode, 2)
    column = {"image": structs([data[0], None, b"text", data[1], data[1]]), "label": pa.array([0, 1, 1, None, 7])}
    write_parquet(tmp_path / "a.parquet", column, ["x", "y"])
    assert faults_of(tmp_path / "a.parquet", tmp_path) == {
        "a.parquet[1]": "no bytes in it: a path alone is not opened",
        "a.parquet[2]": "not a PNG, JPEG or WebP image: UnidentifiedImageError",
        "a.parquet[3]": "no label",
        "a.parquet[4]": "label 7 is none of the 2 classes",
    }


def test_parquets_that_are_no_source(tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(encode, 2)
    path = tmp_path / "in" / "a.parquet"

    def refused(match: str) -> None:
        with pytest.raises(SourceError, match=match) as caught:
            open_source(DataSpec(source=str(tmp_path / "in")), tmp_path)
        assert caught.value.hint

    write_parquet(path, {"image": pa.array(data), "text": pa.array(["a", "b"])})
    refused(r"a.parquet: no single column .* image: binary, text: string")
    write_parquet(path, {"image": pa.array(["a", "b"]), "label": pa.array([0, 1])})
    refused("no single column")
    write_parquet(path, {"image": structs(data), "label": pa.array([None, None], pa.int64())})
    refused("no labelled row")
    write_parquet(path, {"image": structs(data), "label": pa.array([0, 1])})
    write_parquet(path.with_name("b.parquet"), {"img": pa.array(data), "label": pa.array([0, 1])})
    refused("other columns or classes than a.parquet")
    path.with_name("b.parquet").write_bytes(path.read_bytes()[:-9])
    refused("b.parquet: not a Parquet file")
    path.with_name("b.parquet").unlink()
    monkeypatch.setattr(parquet, "GROUP_BYTES", 50)
    refused("row group 0 has .* over the limit of 50")


def test_a_column_whose_name_is_no_text_is_told(tmp_path: Path, encode: Encode) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"image": structs(images(encode, 2)), "label": pa.array([0, 1])}, ["x", "y"])
    whole = path.read_bytes()
    places = [i for i in range(len(whole)) if whole.startswith(b"label", i)]
    assert len(places) > 2
    for place in places:
        path.write_bytes(whole[:place] + b"\xe9" + whole[place + 1 :])
        with contextlib.suppress(SourceError):
            faults_of(path, tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_never_escapes_the_error_tree(data: st.DataObject, tmp_path: Path, encode: Encode) -> None:
    """With any changed byte, images are read or quarantined, or the source raises an error."""
    kind = data.draw(st.sampled_from(["a.tar", "a.parquet"]))
    path = tmp_path / kind
    encoded = images(encode, 3)
    if kind == "a.tar":
        write_tar(path, [m for i, x in enumerate(encoded) for m in ((f"{i}.png", x), (f"{i}.cls", str(i).encode()))])
    else:
        write_parquet(path, {"image": structs(list(encoded)), "label": pa.array([0, 1, 0])}, ["x", "y"])
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    with contextlib.suppress(SourceError):
        faults_of(path, tmp_path)
