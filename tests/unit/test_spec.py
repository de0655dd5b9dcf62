"""The job spec: validation and error messages."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.errors import SpecError
from pipelines.spec import JobSpec, RegisterSpec, TransportSpec, json_schema, load_spec, parse_spec

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMA = CONFIGS / "job.schema.json"
SPECS = sorted(CONFIGS.glob("*.yaml"))


def document(**sections: Any) -> dict[str, Any]:
    """Return a minimal spec."""
    shortest = {
        "name": "a",
        "data": {"source": "digits"},
        "model": {"kind": "perceptron"},
        "objective": {"kind": "classification"},
        "train": {"images": 1000},
    }
    return shortest | sections


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document()))
    return path


# Every error message has the path of the field, the value received, and the valid values.
FAULTS = {
    "name=Cats": ("name:", "[a-z0-9]", "'Cats'"),
    "seed=-1": ("seed:", "greater than or equal to 0", "-1"),
    "data.source=''": ("data.source:", "at least 1 character", "''"),
    "data.size=2": ("data.size:", "greater than or equal to 4", "2"),
    "data.channels=2": ("data.channels:", "1 or 3", "2"),
    "data.test_fraction=1": ("data.test_fraction:", "less than 1", "1"),
    "data.per_class=0": ("data.per_class:", "greater than or equal to 1", "0"),
    "objective={kind: regression, target: noise}": ("objective.target:", "'waves' or 'cone'", "'noise'"),
    "data.max_bad_fraction=.nan": ("data.max_bad_fraction:", "finite", "nan"),
    "model.kind=vgg": (
        "model.kind:",
        "perceptron, mlp, lenet, alexnet, resnet, autoencoder, conv-generator, biggan, flow-unet",
        "'vgg'",
    ),
    "model={kind: mlp, hidden: []}": ("model.hidden:", "at least 1 item", "[]"),
    "model={kind: mlp, hidden: [8, 0]}": ("model.hidden.1:", "greater than or equal to 1", "0"),
    "model={kind: lenet, dropout: 1}": ("model.dropout:", "less than 1", "1"),
    "model={kind: flow-unet, width: 12}": ("model.width:", "multiple of 8", "12"),
    "objective.kind=vae": (
        "objective.kind:",
        "classification, regression, reconstruction, transport, gan, wasserstein, learned-transport, "
        "flow",
        "'vae'",
    ),
    "objective.loss=hinge": ("objective.loss:", "'cross-entropy' or 'least-squares'", "'hinge'"),
    "objective={kind: transport, cost: l1}": ("objective.cost:", "'squared-euclidean', 'euclidean'", "'l1'"),
    "objective={kind: transport, distance: {kind: l2}}": (
        "objective.distance.kind:", "exact, sinkhorn-divergence, sliced", "'l2'",
    ),
    "objective={kind: transport, distance: {kind: sinkhorn-divergence, epsilon: 0}}": (
        "objective.distance.epsilon:", "greater than 0", "0",
    ),
    "objective={kind: flow, coupling: {kind: best}}": (
        "objective.coupling.kind:", "independent, batch, pool, recorded", "'best'",
    ),
    "objective={kind: flow, coupling: {kind: pool, points: 0}}": (
        "objective.coupling.points:", "greater than or equal to 1", "0",
    ),
    "optimizer.learning_rate=0": ("optimizer.learning_rate:", "greater than 0", "0"),
    "optimizer.learning_rate=.inf": ("optimizer.learning_rate:", "finite", "inf"),
    "optimizer.schedule=step": ("optimizer.schedule:", "'constant', 'cosine' or 'one-cycle'", "'step'"),
    "workers.count=0": ("workers.count:", "greater than or equal to 1", "0"),
    "workers.device=tpu": ("workers.device:", "'auto', 'cpu' or 'gpu'", "'tpu'"),
    "register_as={name: a b}": ("register_as.name:", "[a-z0-9]", "'a b'"),
}  # fmt: skip


@pytest.mark.parametrize("override", FAULTS)
def test_a_fault_is_told_by_path_value_and_choices(file: Path, override: str) -> None:
    path, choices, value = FAULTS[override]
    with pytest.raises(SpecError) as caught:
        load_spec(file, [override])
    head, *lines = str(caught.value).splitlines()
    assert head == f"{file}: invalid job spec:"
    (line,) = lines
    assert line.startswith(f"  {path} ")
    assert choices in line
    assert line.endswith(f"(received {value})")


@pytest.mark.parametrize("field", ["images", "log_every", "evaluate_every", "checkpoint_every", "ema_half_life"])
@pytest.mark.parametrize("value", ["0", "-5", "1.5", "many"])
def test_durations_are_whole_numbers_of_images(file: Path, field: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"train\.{field}: .*\(received '?{re.escape(value)}'?\)"):
        load_spec(file, [f"train.{field}={value}"])


def test_every_fault_has_its_line() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(document(seed=-1, train={"batch": 0}), where="here")
    lines = str(caught.value).splitlines()
    assert lines[0] == "here: invalid job spec:"
    assert [line.split(":")[0] for line in lines[1:]] == ["  seed", "  train.images", "  train.batch"]
    assert lines[2].endswith("missing")


@pytest.mark.parametrize(
    "path", ["extra", "data.extra", "model.extra", "objective.extra", "optimizer.extra", "train.extra", "workers.extra"]
)
def test_unknown_fields_are_refused(file: Path, path: str) -> None:
    with pytest.raises(SpecError, match=rf"\n  {re.escape(path)}: no such field \(received 3\)$"):
        load_spec(file, [f"{path}=3"])


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("trian=3", "train"),
        ("train.imgaes=3", "images"),
        ("model.kind=letnet", "lenet"),
        ("objective.kind=waserstein", "wasserstein"),
        ("optimizer.schedule=cosin", "cosine"),
    ],
)
def test_a_misspelt_name_gets_a_guess(file: Path, override: str, guess: str) -> None:
    with pytest.raises(SpecError, match=rf"; did you mean {guess}\?"):
        load_spec(file, [override])


@pytest.mark.parametrize("section", ["model", "objective"])
def test_a_section_says_its_kind(section: str) -> None:
    with pytest.raises(SpecError, match=rf"\n  {section}\.kind: missing$"):
        parse_spec(document(**{section: {}}))


@pytest.mark.parametrize(
    ("coupling", "fault"),
    [
        ({}, "objective.coupling.kind: missing"),
        ({"kind": "recorded"}, "objective.coupling.file: missing"),
        ({"kind": "batch", "points": 8}, "objective.coupling.points: no such field (received 8)"),
        (3, "objective.coupling: must be a mapping (received 3)"),
    ],
)
def test_faults_of_a_coupling_are_told_by_their_path_in_the_file(coupling: Any, fault: str) -> None:
    sections = {"model": {"kind": "flow-unet"}, "objective": {"kind": "flow", "coupling": coupling}}
    with pytest.raises(SpecError) as caught:
        parse_spec(document(**sections))
    assert str(caught.value).splitlines()[1:] == [f"  {fault}"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": {"kind": "transport"}},
            "objective 'transport' cannot train model 'perceptron'; use conv-generator or biggan",
        ),
        (
            {"model": {"kind": "biggan"}, "objective": {"kind": "transport"}},
            "objective 'transport' with a conditional model requires objective.features",
        ),
        (
            {"model": {"kind": "biggan"}, "objective": {"kind": "transport", "features": [{}]}},
            "objective.condition_weight 0: plans would ignore the classes of a conditional model; use about 2",
        ),
        (
            {
                "model": {"kind": "conv-generator"},
                "objective": {"kind": "transport", "features": [{}], "condition_weight": 1},
            },
            "objective.condition_weight requires a conditional model",
        ),
        (
            {
                "model": {"kind": "conv-generator"},
                "objective": {"kind": "transport", "features": [{}], "self_term": "two-batch"},
                "train": {"images": 1, "batch": 3},
            },
            "train.batch 3 leaves some of 2 workers without samples in one half of the batch; objective.self_term "
            "two-batch compares the two halves",
        ),
        (
            {
                "model": {"kind": "conv-generator"},
                "objective": {"kind": "transport", "features": [{}], "pool": 24},
                "train": {"images": 1, "batch": 16},
            },
            "objective.pool 24 is not a multiple of train.batch 16",
        ),
        (
            {
                "model": {"kind": "conv-generator"},
                "objective": {"kind": "transport", "features": [{}], "pool": 32},
                "train": {"images": 31, "batch": 16},
            },
            "objective.pool 32 is larger than train.images 31: the job would end before its second pool; use a smaller "
            "pool or more images",
        ),
        (
            {
                "model": {"kind": "conv-generator"},
                "objective": {"kind": "transport", "features": [{}], "self_term": "two-batch", "pool": 10},
                "train": {"images": 31, "batch": 5},
            },
            "train.batch 5 is odd; objective.self_term two-batch needs two equal halves",
        ),
        (
            {
                "model": {"kind": "conv-generator"},
                "objective": {"kind": "transport", "features": [{}], "reals": 1},
            },
            "objective.reals 1 leaves some of 2 workers without images",
        ),
        (
            {
                "model": {"kind": "conv-generator"},
                "objective": {"kind": "transport", "features": [{"network": "a@best"}]},
                "evaluation": {"reference": "a/3"},
            },
            "evaluation.reference 'a/3' is also a network of objective.features: the evaluation must use a network "
            "that the generator is not trained against; choose another one",
        ),
        (
            {"model": {"kind": "conv-generator"}},
            "objective 'classification' cannot train model 'conv-generator'; "
            "use perceptron or mlp or lenet or alexnet or resnet",
        ),
        (
            {"model": {"kind": "conv-generator"}, "objective": {"kind": "flow"}},
            "objective 'flow' cannot train model 'conv-generator'; use flow-unet",
        ),
        (
            {"model": {"kind": "flow-unet"}, "objective": {"kind": "flow"}, "train": {"images": 1, "batch": 100}},
            "objective.coupling.points 4096 is not a multiple of train.batch 100",
        ),
        (
            {
                "model": {"kind": "flow-unet"},
                "objective": {"kind": "flow", "coupling": {"kind": "batch", "condition_weight": 1}},
            },
            "objective.coupling.condition_weight requires a conditional model",
        ),
        (
            {
                "objective": {"kind": "classification", "cutmix": 1},
                "train": {"images": 1, "accumulate": 2},
            },
            "train.accumulate 2 would split the batches, which this objective needs whole",
        ),
        (
            {"objective": {"kind": "regression"}, "register_as": {"name": "a"}},
            "register_as is for models that the endpoint can serve; it cannot serve a regression",
        ),
        (
            {"objective": {"kind": "regression"}, "evaluation": {"reference": "a"}},
            "evaluation.reference 'a' is for generators; this job does not train one",
        ),
        (
            {"train": {"images": 1, "batch": 2}, "workers": {"count": 3}},
            "train.batch 2 leaves some of 3 workers without images",
        ),
    ],
)
def test_sections_belong_together(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=rf"\n  spec: {re.escape(message)}$"):
        parse_spec(document(**sections))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"self_term": "two-batch"}, "self_term two-batch requires objective.features"),
        ({"reals": 8}, "reals 8 requires objective.features"),
        ({"pool": 8}, "pool 8 requires objective.features"),
        ({"features": [{}], "pool": 8, "normalise": True}, "normalise with pool 8"),
        ({"normalise": True}, "normalise True requires objective.features"),
        ({"features": [{}], "distance": {"kind": "sliced"}}, "distance sliced does not support features"),
        ({"features": [{}], "cost": "cosine"}, "cost 'cosine' does not support features"),
        ({"features": [{}], "class_weights": {"a": 2}}, "class_weights {'a': 2.0} with features"),
        (
            {"features": [{}], "distance": {"kind": "sinkhorn-divergence"}},
            "distance.epsilon 10 is too large for features, where the mean cost between two real images is 1",
        ),
        (
            {"features": [{"network": "imagenet-mobilenet-v2", "layer": 1}]},
            "layer 1: imagenet-mobilenet-v2 has a single feature layer; remove layer",
        ),
        ({"features": [{"layer": 1}]}, "layer 1: pixels have no layers; remove layer"),
        ({"features": [{"network": "a", "side": 7}]}, "side 7: the default layer of a is not a feature map; set layer"),
        ({"features": [{"network": "imagenet-inception-v3"}]}, "network imagenet-inception-v3 is for evaluation only"),
    ],
)
def test_what_a_transport_cost_compares_is_told_apart(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        parse_spec(document(model={"kind": "conv-generator"}, objective={"kind": "transport"} | objective))


def test_registered_models_are_pinned_to_their_versions() -> None:
    features = [{"network": "a"}, {}, {"network": "imagenet-mobilenet-v2"}, {"network": "a", "layer": 1}]
    spec = parse_spec(
        document(
            model={"kind": "conv-generator"},
            objective={"kind": "transport", "features": features},
            evaluation={"reference": "b@best"},
        )
    )
    asked = []

    def version(name: str) -> str:
        asked.append(name)
        return f"{name.partition('@')[0]}/7"

    pinned = spec.with_versions(version)
    assert sorted(asked) == ["a", "b@best"]
    assert pinned.evaluation.reference == "b/7"
    assert isinstance(pinned.objective, TransportSpec)
    assert [one.network for one in pinned.objective.features] == ["a/7", "pixels", "imagenet-mobilenet-v2", "a/7"]
    assert pinned.objective.features[3].layer == 1
    assert pinned.with_versions(version) is not spec
    plain = parse_spec(document())
    assert plain.with_versions(version) is plain


FINGERPRINTS = {
    "lenet": "93bfa2d06201a5d5",
    "gan": "39a2f5e70360a0ef",
    "transport-generator": "70f42e2bbb0191d8",
    "conditional-flow": "79e745ce3be47edd",
    "learned-transport": "e5dc30e362186d67",
}
"""Fingerprints of configs; they must not change, because checkpoints contain them."""


@pytest.mark.parametrize("config", FINGERPRINTS)
def test_new_fields_leave_the_fingerprints_of_old_specs(config: str) -> None:
    """Existing checkpoints can be resumed. A config that is changed on purpose gets another fingerprint."""
    spec = load_spec(CONFIGS / f"{config}.yaml")
    assert spec.fingerprint()[:16] == FINGERPRINTS[config]


def test_new_fields_that_are_set_have_a_fingerprint_of_their_own() -> None:
    plain = document(model={"kind": "conv-generator"}, objective={"kind": "transport"})
    changed = [
        plain | {"objective": {"kind": "transport", "features": [{}]}},
        plain | {"objective": {"kind": "transport", "features": [{}], "reals": 7}},
        plain | {"objective": {"kind": "transport", "features": [{}], "components": None}},
        plain | {"model": {"kind": "conv-generator", "conditional": True}, "objective": {"kind": "gan"}},
        plain | {"objective": {"kind": "gan"}},
    ]
    assert len({parse_spec(one).fingerprint() for one in [plain, *changed]}) == 6


def test_images_are_mixed_in_one_way() -> None:
    with pytest.raises(SpecError, match=r"objective: mixup 0\.2 and cutmix 1\.0 exclude each other"):
        parse_spec(document(objective={"kind": "classification", "mixup": 0.2, "cutmix": 1}))


def test_overrides_are_yaml_and_the_last_one_counts(file: Path) -> None:
    spec = load_spec(
        file,
        [
            "train.images=20000",
            "train.images=30000",
            "optimizer.schedule=cosine",
            "model={kind: mlp, hidden: [3, 4]}",
            "objective.flip=true",
            "train.ema_half_life=null",
            "register_as.name=other",
            "data.source=a=b",
        ],
    )
    assert spec.train.images == 30000
    assert spec.optimizer.schedule == "cosine"
    assert spec.model.model_dump() == {"kind": "mlp", "hidden": (3, 4), "dropout": 0.0}
    assert spec.objective.model_dump()["flip"] is True
    assert spec.train.ema_half_life is None
    assert spec.registered == RegisterSpec(name="other", alias="live")
    assert spec.data.source == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.images", "not an assignment"),
        ("=3", "not an assignment"),
        ("train..images=3", "not an assignment"),
        ("name.deep=3", "name is a value, not a section"),
        ("train.images=[1", "the value is not YAML"),
        ("train.images=2024-13-01", "the value is not YAML"),
    ],
)
def test_overrides_that_are_none(file: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"--set {override!r}: {message}")):
        load_spec(file, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "a mapping with name, data, model, objective and train expected"),
        (b"", "a mapping with name"),
        (b"a: [", "not YAML"),
        (b"a: 2024-13-01", "not YAML"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"!!python/object/apply:os.system [exit]", "not YAML"),
    ],
)
def test_files_that_are_no_specs(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=re.escape(f"{path}: {message}")):
        load_spec(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml: no such file\n  hint: `monge init` copies"):
        load_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)


def test_a_spec_is_frozen() -> None:
    spec = parse_spec(document())
    with pytest.raises(ValidationError, match="frozen"):
        spec.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.train.batch = 3  # type: ignore[misc]


def test_the_fingerprint_is_of_what_decides_the_result() -> None:
    fingerprint = parse_spec(document()).fingerprint()
    for same in ({"name": "b"}, {"workers": {"count": 3}}, {"register_as": {"name": "c"}}, {"seed": 0}):
        assert parse_spec(document(**same)).fingerprint() == fingerprint, same
    for other in (
        {"seed": 1},
        {"data": {"source": "digits", "size": 12}},
        {"train": {"images": 1000, "batch": 64}},
        {"optimizer": {"learning_rate": 0.1}},
        {"objective": {"kind": "classification", "flip": True}},
        {"model": {"kind": "mlp"}},
    ):
        assert parse_spec(document(**other)).fingerprint() != fingerprint, other


def test_the_registered_name_is_the_jobs_by_default() -> None:
    assert parse_spec(document()).registered == RegisterSpec(name="a", alias="live")


def test_configs_are_there() -> None:
    kinds = {load_spec(path).model.kind for path in SPECS}
    wanted = {"perceptron", "mlp", "lenet", "alexnet", "resnet", "autoencoder", "conv-generator", "biggan", "flow-unet"}
    assert kinds == wanted


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_configs_load_name_their_schema_and_survive_a_round_trip(path: Path) -> None:
    spec = load_spec(path)
    assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA.name}"
    assert JobSpec.model_validate(yaml.safe_load(spec.to_yaml())) == spec


def test_the_published_schema_is_current() -> None:
    assert SCHEMA.read_text() == json_schema(), "run `make schema`"
