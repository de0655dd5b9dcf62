"""Images labelled by a CSV or JSONL file, and splits from folder names."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.loader import open_dataset
from pipelines.data.shard import write_manifest, write_shard
from pipelines.data.source import fingerprint, open_source
from pipelines.data.sources.base import sorted_classes, stated_split
from pipelines.errors import SourceError
from pipelines.spec import DataSpec

Encode = Callable[..., bytes]


def png(encode: Encode, value: int) -> bytes:
    return encode(np.full((8, 8), value, np.uint8))


@pytest.fixture
def flat(tmp_path: Path, encode: Encode) -> Path:
    """Create five images in one folder, one of them in a subfolder."""
    root = tmp_path / "flat"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b é.PNG", "c.webp", "d.jpg", "sub/e.png")):
        kind = {"webp": "WEBP", "jpg": "JPEG"}.get(name[-4:].strip("."), "PNG")
        (root / name).write_bytes(encode(np.full((8, 8, 3), 40 * i, np.uint8), kind))
    return root


def labelled(root: Path, cache: Path) -> dict[str, str]:
    source = open_source(DataSpec(source=str(root)), cache)
    assert source.fingerprint == fingerprint(DataSpec(source=str(root)))
    return {name: source.classes[label] for name, label, _ in map(source.item, range(len(source)))}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.csv", "file_name,label\na.png,cat\nb é.PNG,dog\n./c.webp,cat\nsub/e.png,dog\n"),
        (
            "labels.csv",
            '\ufefffilename;Label;more\r\na.png;cat;1\r\n\r\n"b é.PNG";dog;2\r\nc.webp;cat;\r\nsub\\e.png;dog;3\r\n',
        ),
        ("Metadata.CSV", "label\tfile_name\ncat\ta.png\ndog\tb é.PNG\n cat \tc.webp\ndog\tsub/e.png\n"),
        (
            "labels.csv",
            unicodedata.normalize("NFD", "image,class\na.png,cat\nb é.PNG,dog\nc.webp,cat\nsub/e.png,dog\n"),
        ),
        (
            "metadata.jsonl",
            "".join(
                json.dumps({"file_name": name, "label": label, "caption": "\u2028"}, ensure_ascii=False) + "\n\n"
                for name, label in {"a.png": "cat", "b é.PNG": "dog", "c.webp": "cat", "sub/e.png": "dog"}.items()
            ),
        ),
    ],
)
def test_a_table_labels_the_images(flat: Path, tmp_path: Path, file: str, text: str) -> None:
    (flat / file).write_text(text, newline="")
    assert labelled(flat, tmp_path) == {"a.png": "cat", "b é.PNG": "dog", "c.webp": "cat", "sub/e.png": "dog"}
    assert open_source(DataSpec(source=str(flat)), tmp_path).ignored == 1


def test_a_table_of_any_name_beside_a_flat_folder(tmp_path: Path, encode: Encode) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(encode, i))
    (tmp_path / "my table.csv").write_text("file_name,label\n0.png,10\n1.png,9\n2.png,10\n")
    source = open_source(DataSpec(source=str(tmp_path)), tmp_path / "cache")
    assert source.classes == ("9", "10")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels.csv", "file_name,label\na.png,cat\nz.png,dog\n", r"labels.csv, line 3: there is no image 'z.png'"),
        ("labels.csv", "file_name,label\n../secret.png,cat\n", r"line 2: there is no image '../secret.png'"),
        ("labels.csv", "file_name,label\na.png,cat\na.png,dog\n", r"line 3: 'a.png' was labelled in line 2"),
        ("labels.csv", "file_name,label\na.png, \n", r"line 2: field 'label' holds ' '"),
        ("labels.csv", "file_name,label\na.png\n", r"line 2: not the 2 fields"),
        ("labels.csv", "file_name,label\na.png,b,c\n", r"line 2: not the 2 fields"),
        ("labels.csv", "a.png,cat\nd.jpg,cat\n", r"line 2: no field for the file among 'a.png', 'cat'"),
        ("labels.csv", "file_name,answer\na.png,cat\n", r"line 2: no field for the label"),
        ("labels.csv", 'file_name,label\n"a.png,cat\n', r"line 2: "),
        ("labels.csv", "file_name,label\n", "no rows"),
        ("labels.csv", "", "no rows"),
        ("labels.jsonl", '{"file_name": "a.png", "label": 1}\n{"file_name": \n', r"line 2: not JSON"),
        ("labels.jsonl", "[1]\n", r"line 1: not an object"),
        ("labels.jsonl", "[" * 100_000 + "\n", r"line 1: not JSON"),
        ("labels.jsonl", '{"file_name": "a.png", "label": true}\n', r"line 1: field 'label' holds True"),
        ("labels.jsonl", '{"file_name": "a.png", "label": 0.5}\n', r"line 1: field 'label' holds 0.5"),
    ],
)
def test_a_wrong_table_is_told_by_line_and_field(
    flat: Path, tmp_path: Path, file: str, text: str, message: str
) -> None:
    (flat / file).write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(DataSpec(source=str(flat)), tmp_path)
    assert caught.value.hint


def test_a_table_that_is_no_text(flat: Path, tmp_path: Path) -> None:
    (flat / "labels.csv").write_bytes(b"file_name,label\na.png,\xff\n")
    with pytest.raises(SourceError, match="line 2: not UTF-8"):
        open_source(DataSpec(source=str(flat)), tmp_path)


def test_two_tables(flat: Path, tmp_path: Path) -> None:
    for name in ("labels.csv", "metadata.jsonl"):
        (flat / name).write_text("")
    with pytest.raises(SourceError, match=r"several tables of labels: labels.csv, metadata.jsonl"):
        open_source(DataSpec(source=str(flat)), tmp_path)


def image_folder(root: Path, encode: Encode, parts: tuple[str, ...]) -> None:
    value = 0
    for part in parts:
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                value += 9
                (root / part / name / f"{i}.png").write_bytes(png(encode, value))


def test_stated_splits_are_kept(tmp_path: Path, encode: Encode) -> None:
    image_folder(tmp_path / "a", encode, ("train", "test", "validation"))
    source = open_source(DataSpec(source=str(tmp_path / "a")), tmp_path)
    assert (source.classes, len(source), source.ignored) == (("ant", "bee"), 12, 6)
    split = source.official_split(0, 12)
    assert split is not None
    assert [source.name(i).startswith("test/") for i in range(12)] == split.astype(bool).tolist()
    image_folder(tmp_path / "b", encode, ("Train", "val"))
    source = open_source(DataSpec(source=str(tmp_path / "b")), tmp_path)
    split = source.official_split(0, 12)
    assert split is not None
    assert (len(source), int(split.sum())) == (12, 6)
    image_folder(tmp_path / "c", encode, ("train",))
    source = open_source(DataSpec(source=str(tmp_path / "c")), tmp_path)
    assert source.official_split(0, len(source)) is None
    assert source.classes == ("ant", "bee")


@pytest.mark.parametrize("above", [True, False])
def test_tables_of_split_folders(tmp_path: Path, encode: Encode, above: bool) -> None:
    root = tmp_path / "root"
    lines = []
    for i, part in enumerate(("train", "test")):
        (root / part).mkdir(parents=True)
        for j in range(3):
            (root / part / f"{j}.png").write_bytes(png(encode, 50 * i + 9 * j))
            lines.append((part, f"{j}.png,{'ab'[j % 2]}"))
    if above:
        (root / "metadata.csv").write_text("file_name,label\n" + "".join(f"{p}/{line}\n" for p, line in lines))
    else:
        for part in ("train", "test"):
            rows = "".join(line + "\n" for p, line in lines if p == part)
            (root / part / "metadata.csv").write_text("file_name,label\n" + rows)
    source = open_source(DataSpec(source=str(root)), tmp_path)
    split = source.official_split(0, 6)
    assert split is not None
    assert [(source.name(i).split("/")[0], int(split[i])) for i in range(6)] == [("test", 1)] * 3 + [("train", 0)] * 3


def test_a_twin_across_stated_splits_is_dropped_from_train_and_listed(tmp_path: Path, encode: Encode) -> None:
    root = tmp_path / "root"
    image_folder(root, encode, ("train", "test"))
    (root / "train" / "bee" / "twin.png").write_bytes((root / "test" / "ant" / "1.png").read_bytes())
    (root / "train" / "ant" / "bad.png").write_bytes(b"no image")
    spec = DataSpec(source=str(root), max_bad_fraction=0.2)
    source = open_source(spec, tmp_path)
    out = tmp_path / "out"
    receipts = [write_shard(source, out, i, start, min(start + 5, 14)) for i, start in enumerate((0, 5, 10))]
    manifest = write_manifest(source, spec, out, receipts)
    assert manifest.counts == {"train": {"ant": 3, "bee": 3}, "test": {"ant": 3, "bee": 3}}
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in listed] == ["train/ant/bad.png", "train/bee/twin.png"]
    assert listed[1]["reason"] == "an image that is kept has its pixels"


def test_several_kinds_in_one_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "all.tar").write_bytes(b"")
    with pytest.raises(SourceError, match=r"several kinds of sources: 12 image files .*, 1 tar files \(all.tar\)"):
        open_source(DataSpec(source=str(folder)), tmp_path)


def test_a_folder_of_one_class_is_a_source(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "root" / "cats 猫").mkdir(parents=True)
    (tmp_path / "root" / "cats 猫" / "0.png").write_bytes(png(encode, 1))
    assert open_source(DataSpec(source=str(tmp_path / "root")), tmp_path).classes == ("cats 猫",)


@pytest.mark.parametrize("given_as", ["{}.png", "{}", "sub/{}.png"])
def test_short_names_that_fit_one_image(tmp_path: Path, encode: Encode, given_as: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for i in range(3):
        (root / "sub" / f"0{i}.png").write_bytes(png(encode, i))
    (root / "train.csv").write_text("id,label\n" + "".join(f"{given_as.format(f'0{i}')},c{i}\n" for i in range(3)))
    assert labelled(root, tmp_path) == {f"sub/0{i}.png": f"c{i}" for i in range(3)}
    (root / "00.png").write_bytes(png(encode, 9))
    if "/" not in given_as:
        (root / "train.csv").write_text("id,label\n00,c0\n")
        with pytest.raises(SourceError, match="line 2: there is no image '00'"):
            open_source(DataSpec(source=str(root)), tmp_path)


def test_a_folder_around_the_class_folders_is_no_class(tmp_path: Path, encode: Encode) -> None:
    image_folder(tmp_path / "a" / "data", encode, ("train", "test"))
    (tmp_path / "a" / "__MACOSX").mkdir()
    source = open_source(DataSpec(source=str(tmp_path / "a")), tmp_path)
    assert source.classes == ("ant", "bee")
    assert source.name(0) == "data/test/ant/0.png"
    split = source.official_split(0, 12)
    assert split is not None
    assert split.tolist() == [int("/test/" in source.name(i)) for i in range(12)]
    image_folder(tmp_path / "b" / "pets", encode, ("",))
    assert open_source(DataSpec(source=str(tmp_path / "b")), tmp_path).classes == ("ant", "bee")


def test_a_name_that_is_no_text_is_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "ant" / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    spec = DataSpec(source=str(folder), max_bad_fraction=0.2)
    source = open_source(spec, tmp_path)
    write_manifest(source, spec, tmp_path / "out", [write_shard(source, tmp_path / "out", 0, 0, 13)])
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["name"] == r"ant/\xff.png"


def test_one_class_makes_a_data_set(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "root" / "cats").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "root" / "cats" / f"{i}.png").write_bytes(png(encode, i))
    spec = DataSpec(source=str(tmp_path / "root"))
    source = open_source(spec, tmp_path)
    manifest = write_manifest(source, spec, tmp_path / "out", [write_shard(source, tmp_path / "out", 0, 0, 4)])
    assert manifest.counts == {"train": {"cats": 3}, "test": {"cats": 1}}
    assert open_dataset(tmp_path / "out").classes == ("cats",)


@given(st.lists(st.sampled_from(["train", "test", "validation", ""])))
def test_a_stated_split_keeps_order_and_sides(parts: list[str]) -> None:
    kept, split = stated_split(parts)
    assert kept == sorted(set(kept))
    if split is None:
        assert len(kept) == len(parts)
    else:
        assert len(split) == len(kept)
        assert set(split) == {0, 1}
        assert all((parts[i] == "train") == (side == 0) for i, side in zip(kept, split, strict=True))
        assert {parts[i] for i in range(len(parts)) if i not in kept} <= {"validation"}


@given(st.lists(st.one_of(st.integers(-20, 20).map(str), st.text(min_size=1, max_size=3))), st.randoms())
def test_classes_depend_on_no_order(labels: list[str], random: object) -> None:
    shuffled = list(labels)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    classes = sorted_classes(labels)
    assert classes == sorted_classes(shuffled)
    assert set(classes) == set(labels)
