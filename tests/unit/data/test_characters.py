"""Characters: each image is a function of seed and number, with known parts."""

import hashlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import packages
from pipelines.data.catalogue import NAMES, classes_of
from pipelines.data.packages import Wheel
from pipelines.data.source import fingerprint, open_source
from pipelines.data.sources import parts
from pipelines.data.sources.characters import SIDE, CharacterSource, attributes, open_characters
from pipelines.errors import SourceError, SpecError
from pipelines.spec import CharacterSet, CharactersSpec, DataSpec, parse_data

OPAQUE, HALF = 255, 128
SIZE = 16


def part(colour: tuple[int, int, int], rows: slice, alpha: int = OPAQUE) -> np.ndarray:
    """Create a picture with some coloured rows; the others are transparent."""
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[rows] = (*colour, alpha)
    return pixels


RED, GREEN, BLUE, BLACK = (200, 0, 0), (0, 200, 0), (0, 0, 200), (0, 0, 0)
ALL, UPPER, LOWER, LAST = slice(0, 16), slice(0, 8), slice(8, 16), slice(15, 16)

PICTURES = {
    # The first category by its number lies above the second one: the text behind the # decides.
    "set4/000#01eyes/000#eyes10.png": part(BLACK, UPPER),
    "set4/000#01eyes/001#eyes9.png": part(BLUE, UPPER, HALF),
    "set4/000#01eyes/002#eyes9b.png": part(BLUE, UPPER, HALF),  # the same pixels as the one before
    "set4/001#00body/000#body0.png": part(RED, ALL),
    "set4/001#00body/001#body1.png": part(GREEN, ALL),
    "set5/000#Body/Pale.png": part(RED, ALL),
    "set5/000#Body/Black.png": part(BLACK, ALL),
    "set5/001#FacialHair/Blank.png": part(BLACK, slice(0, 0)),
    "set5/001#FacialHair/Beard.png": part(GREEN, slice(8, 12)),
    "set5/002#Accessories/Round.png": part(BLUE, UPPER),
    "set5/002#Accessories/Kurt.png": part(GREEN, UPPER),
    "set1/red/000#Mouth/000#red_mouth-02.png": part(RED, LAST),
    "set1/red/000#Mouth/001#red_mouth-01.png": part(BLACK, LAST),
    "set1/red/001#01Body/000#red_body-01.png": part(RED, UPPER),
    "set1/red/001#01Body/001#red_body-02.png": part(RED, LOWER),
    "set1/blue/000#Mouth/000#blue_mouth-01.png": part(GREEN, LAST),
    "set1/blue/000#Mouth/001#blue_mouth-02.png": part(BLUE, LAST),
    "set1/blue/001#01Body/000#blue__body-02.png": part(BLUE, LOWER),
    "set1/blue/001#01Body/001#blue__body-01.png": part(BLUE, UPPER),
}


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("nothing was to be fetched")


@pytest.fixture
def cache(tmp_path: Path, encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a cache with a wheel of few small parts."""
    folder = tmp_path / "cache"
    folder.mkdir()
    with zipfile.ZipFile(folder / "small.whl", "w") as archive:
        for name, pixels in PICTURES.items():
            archive.writestr(f"robohash/sets/{name}", encode(pixels))
        archive.writestr("robohash/backgrounds/bg1/000.png", encode(part(RED, ALL)))
    sha256 = hashlib.sha256((folder / "small.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(parts, "WHEEL", Wheel("small==1", "small.whl", sha256))
    monkeypatch.setattr(packages, "run_command", refuse)
    return folder


def spec_of(
    *sets: CharacterSet, count: int = 100, seed: int = 0, size: int | None = SIZE, channels: int = 3
) -> DataSpec:
    section = {"sets": sets or ("kittens", "robots", "people"), "count": count, "seed": seed}
    return DataSpec.model_validate({"source": "characters", "size": size, "channels": channels, "characters": section})


def images(source: CharacterSource, n: int) -> np.ndarray:
    return np.stack([source.item(i)[2] for i in range(n)])


def test_the_same_spec_gives_the_same_images_and_another_seed_others(cache: Path, tmp_path: Path) -> None:
    first = images(open_characters(spec_of(), cache), 100)
    assert np.array_equal(images(open_characters(spec_of(), cache), 100), first)
    assert not np.array_equal(images(open_characters(spec_of(seed=1), cache), 100), first)


def test_a_larger_data_set_begins_with_the_smaller_one(cache: Path) -> None:
    small, large = (open_characters(spec_of(count=count), cache) for count in (100, 1000))
    assert (len(small), len(large)) == (100, 1000)
    assert np.array_equal(images(small, 100), images(large, 100))
    for name, found in small.attributes().items():
        assert np.array_equal(large.attributes()[name].parts[: len(found.parts)], found.parts)


def test_the_sets_are_the_classes_in_turn(cache: Path) -> None:
    source = open_characters(spec_of("people", "kittens", "robots", count=91), cache)
    assert source.classes == ("people", "kittens", "robots")
    labels = [source.item(i)[1] for i in range(len(source))]
    assert np.bincount(labels).tolist() == [31, 30, 30]
    for label, found in enumerate(source.attributes().values()):
        assert found.images.tolist() == [i for i in range(91) if labels[i] == label]


def test_attributes_tell_what_an_image_shows(cache: Path) -> None:
    spec = spec_of()
    source = open_characters(spec, cache)
    shown: dict[tuple[str, ...], bytes] = {}
    for name, found in attributes(spec, cache).items():
        for number, chosen in zip(found.images.tolist(), found.parts, strict=True):
            named = [category.parts[at] for category, at in zip(found.categories, chosen, strict=True)]
            pixels = source.item(number)[2].tobytes()
            assert shown.setdefault((name, *named), pixels) == pixels
    kinds = 2 * 2 + 2 * 2 * 2 + 2 * 2 * 2
    assert len(shown) == len(set(shown.values())) == kinds  # each combination was drawn, and no two look alike


def test_every_part_is_drawn_equally_often(cache: Path) -> None:
    for found in open_characters(spec_of(count=6000), cache).attributes().values():
        for category, drawn in zip(found.categories, found.parts.T, strict=True):
            share = np.bincount(drawn, minlength=len(category.parts)) / len(drawn)
            assert abs(share - 1 / len(category.parts)).max() < 0.05


def test_categories_are_named_from_the_lowest_layer_up_and_equal_parts_count_once(cache: Path) -> None:
    found = open_characters(spec_of(), cache).attributes()
    named = {name: {kind.name: kind.parts for kind in one.categories} for name, one in found.items()}
    assert named == {
        "kittens": {"body": ("body0", "body1"), "eyes": ("eyes9", "eyes10")},
        "robots": {"colour": ("blue", "red"), "body": ("body-01", "body-02"), "mouth": ("mouth-01", "mouth-02")},
        "people": {"body": ("Black", "Pale"), "facial-hair": ("Beard", "Blank"), "accessories": ("Kurt", "Round")},
    }
    assert [list(one) for one in named.values()] == [
        ["body", "eyes"], ["colour", "body", "mouth"], ["body", "facial-hair", "accessories"],
    ]  # fmt: skip


def test_parts_are_laid_over_white(cache: Path) -> None:
    kittens, robots, people = open_characters(spec_of(), cache).sheets
    image = kittens.compose([1, 0])  # eyes of half-transparent blue over a green body
    mixed = [round(value) for value in (0, 200 * 127 / 255, 200 * 128 / 255)]
    assert abs(image[UPPER].astype(int) - mixed).max() <= 1
    assert (image[LOWER] == GREEN).all()
    image = robots.compose([1, 0, 1])
    assert (image[UPPER] == RED).all()
    assert (image[8:15] == 255).all()
    assert (image[LAST] == RED).all()
    assert (robots.compose([0, 0, 0])[LAST] == GREEN).all()
    image = people.compose([1, 1, 0])
    assert (image[UPPER] == GREEN).all()
    assert (image[LOWER] == RED).all()


@pytest.mark.parametrize(("size", "channels"), [(None, 1), (4, 3), (33, 1), (128, 3)])
def test_sizes_and_channels(cache: Path, size: int | None, channels: int) -> None:
    source = open_source(spec_of(size=size, channels=channels), cache)
    side = size or SIDE
    assert source.image.dims == source.item(1)[2].shape == (channels, side, side)


def test_a_source_travels_without_its_parts(cache: Path) -> None:
    source = open_characters(spec_of(), cache)
    drawn = images(source, 10)
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert np.array_equal(images(pickle.loads(data), 10), drawn)


def test_shrunk_parts_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = images(open_characters(spec_of(), cache), 10)
    (cache / "small.whl").unlink()
    assert np.array_equal(images(open_characters(spec_of(), cache), 10), drawn)


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damaged_parts_are_replaced(cache: Path, damage: str) -> None:
    (path,) = open_characters(spec_of("kittens"), cache).files
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "flipped" else data[:200])
    open_characters(spec_of("kittens"), cache)
    assert path.read_bytes() == data


def test_a_forged_wheel_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / parts.WHEEL.file, "w") as archive:
        archive.writestr("robohash/sets/set4/000#00body/000#body0.png", b"")
    with pytest.raises(SourceError, match="its sha256 is not fbb51f1e"):
        open_characters(spec_of(), tmp_path)


def test_the_fingerprint_is_of_the_section(cache: Path) -> None:
    bare = DataSpec(source="characters", channels=3)
    assert open_source(spec_of(), cache).fingerprint == fingerprint(spec_of())
    assert fingerprint(bare) == fingerprint(bare.model_copy(update={"characters": CharactersSpec()}))
    specs = [
        *(spec_of(), spec_of(count=101), spec_of(seed=1), spec_of("kittens"), spec_of("people", "kittens")),
        *(spec_of("kittens", "people"), spec_of(size=32), spec_of(channels=1), bare),
    ]
    assert len({fingerprint(spec) for spec in specs}) == len(specs)


def test_other_sources_keep_their_fingerprints() -> None:
    expected = "4bd076e70e59eefc708d2a97598ed5f3be75f4fc090f9d7b51433be0fadbcbe4"
    assert fingerprint(DataSpec(source="digits")) == expected


def test_classes_are_known_before_anything_is_fetched() -> None:
    assert "characters" in NAMES
    assert classes_of(DataSpec(source="characters")) == ("kittens", "robots", "people")
    assert classes_of(spec_of("heads", "monsters")) == ("heads", "monsters")
    assert classes_of(DataSpec(source="digits")) == tuple("0123456789")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("source=digits", r"characters requires source 'characters', received source 'digits'; remove"),
        ("characters.sets=[]", r"characters\.sets: .* at least 1 item"),
        ("characters.sets=[cows]", r"characters\.sets\.0: .*'kittens', 'people'.* \(received 'cows'\)"),
        ("characters.sets=[people, people]", r"characters\.sets: a set appears twice; list each set once \(received"),
        ("characters.count=9", r"characters\.count: .*greater than or equal to 10 \(received 9\)"),
        ("characters.count=1000001", r"characters\.count: .*less than or equal to 1000000 \(received 1000001\)"),
        ("characters.seed=-1", r"characters\.seed: .*greater than or equal to 0 \(received -1\)"),
        ("characters.eyes=3", r"characters\.eyes: no such field \(received 3\)"),
    ],
)
def test_faults_are_told(override: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        parse_data({"source": "characters", "characters": {"count": 100}}, [override])


@pytest.mark.slow
def test_characters_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("kittens", "robots", "monsters", "heads", size=None, count=500)
    source = open_characters(spec, tmp_path)
    counts = {name: [len(kind.parts) for kind in one.categories] for name, one in source.attributes().items()}
    assert counts == {
        "kittens": [15, 9, 15, 10, 16],
        "robots": [10, 10, 10, 10, 10, 10],
        "monsters": [10, 10, 16, 10, 10, 10, 10],
        "heads": [90, 1, 10, 12, 12, 11, 9],
    }
    drawn = images(source, 100)
    assert len(np.unique(drawn.reshape(100, -1), axis=0)) == 100
    assert 0.2 < (drawn < 250).any(1).mean() < 0.8  # neither blank nor without a background
    monkeypatch.setattr(packages, "run_command", refuse)
    assert np.array_equal(images(open_characters(spec, tmp_path), 100), drawn)
