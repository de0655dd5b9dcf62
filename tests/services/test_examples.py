"""The example specs are copied atomically and never overwrite existing files."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.errors import SpecError
from pipelines.spec import load_spec
from services import examples
from services.cli import app


def test_the_copies_are_valid_specs_beside_their_schema(tmp_path: Path) -> None:
    copied = examples.copy(tmp_path / "configs")
    assert [file.name for file in copied] == sorted(file.name for file in examples.folder().glob("*.yaml"))
    for file in copied:
        load_spec(file)
    assert (tmp_path / "configs" / "job.schema.json").exists()


def test_a_changed_spec_is_kept(tmp_path: Path) -> None:
    examples.copy(tmp_path)
    (tmp_path / "lenet.yaml").write_text("name: mine\n")
    (tmp_path / "mlp.yaml").unlink()
    with pytest.raises(SpecError, match=r"different versions of: lenet\.yaml\n  hint: .*--overwrite"):
        examples.copy(tmp_path)
    assert (tmp_path / "lenet.yaml").read_text() == "name: mine\n"
    assert not (tmp_path / "mlp.yaml").exists()
    examples.copy(tmp_path, overwrite=True)
    assert (tmp_path / "lenet.yaml").read_bytes() == (examples.folder() / "lenet.yaml").read_bytes()


def test_init_names_a_command_to_start_with(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", str(tmp_path / "specs")])
    assert result.exit_code == 0
    assert f"monge submit {tmp_path}/specs/lenet.yaml --follow" in result.output.replace("\n", "")
