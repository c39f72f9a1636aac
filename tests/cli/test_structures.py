from pathlib import Path

from typer.testing import CliRunner

from progidiff.cli.main import app


def run(studies: Path, *words: str) -> str:
    done = CliRunner().invoke(app, ["structures", *words, "--studies", str(studies)])
    return f"{done.exit_code} {' '.join(done.output.split())}"


def test_a_folder_gets_structures_of_its_own_from_the_command_line(tmp_path: Path):
    assert "has id 14" in run(tmp_path, "add", "left ventricle", "--word", "LV", "--color", "#112233")
    assert run(tmp_path, "list") == "0 14 left ventricle (LV)"
    assert "has id 14" in run(tmp_path, "rename", "LV", "LV cavity")
    assert run(tmp_path, "list") == "0 14 LV cavity (left ventricle, LV)"


def test_a_name_that_is_nearly_known_is_asked_back(tmp_path: Path):
    refused = run(tmp_path, "add", "livr")
    assert refused.startswith("2 ")
    assert "nearly 'liver'" in refused
    assert "has id 14" in run(tmp_path, "add", "livr", "--insist")
