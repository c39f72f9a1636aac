"""The command line, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from progidiff.cli.main import app
from progidiff.prompts.structures import STRUCTURES

FAST = ["--steps", "1", "--device", "cpu"]


def run(*words: object, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a command that must end with the exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout, result.stderr


@pytest.fixture
def image(tmp_path, phantom_writer) -> Path:
    return phantom_writer(tmp_path / "scan.nii.gz", shape=(40, 36, 5))


@pytest.fixture(scope="module")
def prediction(tmp_path_factory, phantom_writer, tiny_model) -> tuple[Path, Path]:
    """An image and the results of a prompt for two structures with K=2."""
    folder = tmp_path_factory.mktemp("predict")
    image = phantom_writer(folder / "scan.nii.gz", shape=(40, 36, 5))
    run(
        "predict",
        image,
        "--prompt",
        "liver",
        "--prompt",
        "left kidney, liver",
        "-k",
        2,
        "--seed",
        5,
        "--out",
        folder / "out",
        "--model",
        tiny_model,
        *FAST,
    )
    return image, folder / "out"


def test_predict_writes_what_the_manual_says(prediction):
    _, out = prediction
    assert {path.name for path in out.iterdir()} == {
        "mask.nii.gz", "agreement.nii.gz", "agreement_liver.nii.gz", "agreement_left_kidney.nii.gz",
        "proposal_1.nii.gz", "proposal_2.nii.gz",
        "overlay.png", "result.json",
    }  # fmt: skip
    assert (out / "overlay.png").read_bytes().startswith(b"\x89PNG")


def test_an_image_unlike_the_training_data_gives_a_warning_that_is_kept(image, tiny_model, tmp_path):
    out = tmp_path / "out"
    _, shown = run(
        "predict", image, "--prompt", "liver", "-k", 2, "--modality", "MR", "--out", out, "--model", tiny_model, *FAST
    )
    (warning,) = json.loads((out / "result.json").read_text())["warnings"]
    assert warning == "The image is MR (option); tiny@1 was trained on CT images."
    assert "was trained on CT images" in " ".join(shown.split())


def test_every_result_is_on_the_grid_of_the_image(prediction):
    image, out = prediction
    original = nibabel.load(image)
    for path in out.glob("*.nii.gz"):
        result = nibabel.load(path)
        assert result.shape == original.shape, path.name
        np.testing.assert_array_equal(result.affine, original.affine)
    assert nibabel.load(out / "mask.nii.gz").get_data_dtype() == np.uint8
    agreement = np.asarray(nibabel.load(out / "agreement.nii.gz").dataobj)
    assert set(np.unique(agreement)) <= {0.0, 0.5, 1.0}


def test_labels_volumes_and_settings_are_in_the_result(prediction):
    _, out = prediction
    result = json.loads((out / "result.json").read_text())
    mask = np.asarray(nibabel.load(out / "mask.nii.gz").dataobj)
    assert result["labels"] == {"liver": 6, "left kidney": 3}
    assert set(np.unique(mask)) <= {0, 3, 6}
    for name, entry in result["structures"].items():
        assert entry["mask_ml"] == pytest.approx(
            (mask == result["labels"][name]).sum() * 5.5 * 6.5 * 5 / 1000, abs=1e-3
        )
        assert len(entry["proposals_ml"]) == 2
        assert len(entry["disagreement_per_slice"]) == 5
    assert result["seed"] == 5
    assert result["num_inference_steps"] == 1
    assert result["model_version"] == "tiny@1"
    assert {"torch", "progidiff"} <= set(result["versions"])


def test_the_same_seed_gives_the_same_files(prediction, tiny_model, tmp_path):
    image, out = prediction
    run(
        "predict",
        image,
        "--prompt",
        "liver and left kidney",
        "-k",
        2,
        "--seed",
        5,
        "--out",
        tmp_path,
        "--model",
        tiny_model,
        *FAST,
    )
    for name in ("mask.nii.gz", "proposal_2.nii.gz", "agreement.nii.gz"):
        first, again = (np.asarray(nibabel.load(folder / name).dataobj) for folder in (out, tmp_path))
        np.testing.assert_array_equal(first, again)


def test_a_second_run_leaves_no_files_of_the_first(image, tiny_model, tmp_path):
    out = tmp_path / "out"
    run("predict", image, "--prompt", "liver, aorta", "-k", 3, "--out", out, "--model", tiny_model, *FAST)
    (out / "mine.txt").write_text("stays")
    run("predict", image, "--prompt", "liver", "-k", 1, "--out", out, "--model", tiny_model, *FAST)
    assert {path.name for path in out.iterdir()} == {
        "mask.nii.gz",
        "agreement.nii.gz",
        "proposal_1.nii.gz",
        "overlay.png",
        "result.json",
        "mine.txt",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "spline"], "Did you mean 'spleen'"),
        (["--prompt", "no liver"], "says 'no'"),
        (["--prompt", "liver", "-k", "0"], "num_proposals must lie in"),
        (["--prompt", "liver", "--steps", "1000"], "num_inference_steps must lie in"),
        (["--prompt", "liver", "--seed", "-1"], "seed must lie in"),
        (["--prompt", "liver", "--modality", "PET"], "modality"),
        (["--prompt", "liver", "--adapter", "nobody"], "no adapter 'nobody'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(image, tiny_model, tmp_path, words, message):
    out, err = run("predict", image, "--out", tmp_path / "out", "--model", tiny_model, *words, code=2)
    assert out == ""
    line = err.strip()
    assert line.startswith("Error: ")
    assert "\n" not in line
    assert message in line
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_one_line_and_exit_code_2(tmp_path, tiny_model):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"not an image")
    for path in (broken, tmp_path / "absent.nii.gz"):
        _, err = run("predict", path, "--prompt", "liver", "--out", tmp_path / "out", "--model", tiny_model, code=2)
        assert path.name in err
        assert err.count("\n") == 1


def test_a_missing_model_is_one_line_and_exit_code_2(image, tmp_path):
    _, err = run(
        "predict", image, "--prompt", "liver", "--out", tmp_path / "out", "--model", tmp_path / "nothing", code=2
    )
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def test_results_cannot_go_where_a_file_is(image, tiny_model):
    _, err = run("predict", image, "--prompt", "liver", "--out", image, "--model", tiny_model, code=2)
    assert "is a file. Name a folder" in err


@pytest.fixture
def studies(tmp_path, phantom_writer) -> Path:
    folder = tmp_path / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    for name in ("one", "two", "three"):
        path = phantom_writer(folder / f"{name}.nii.gz", shape=(40, 36, 5))
        image = nibabel.load(path)
        labels = np.zeros(image.shape, dtype=np.uint8)
        labels[10:20, 10:25, 1:4] = 1
        labels[24:30, 10:20, 1:4] = 2
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), folder / "labels" / "final" / f"{name}.nii.gz")
    (folder / "labels.json").write_text('{"1": "liver", "2": "left kidney"}')
    return folder


@pytest.mark.parametrize(
    "cases", [["--cases", "one", "three.nii.gz"], ["--cases", "one,three"], ["--cases", "one", "--cases", "three"]]
)
def test_evaluate_takes_several_cases_in_any_spelling(studies, tiny_model, tmp_path, cases):
    path = tmp_path / "evaluation.json"
    out, err = run(
        "evaluate", "--studies", studies, *cases, "--out", path, "-k", 2, "--no-hd95", "--model", tiny_model, *FAST
    )
    assert out.strip() == str(path)
    assert "liver" in err
    report = json.loads(path.read_text())
    assert [case["case"] for case in report["cases"]] == ["one", "three"]
    assert set(report["summary"]["best"]["dice"]) == {"liver", "left kidney"}


def test_evaluate_takes_several_structures(studies, tiny_model, tmp_path):
    path = tmp_path / "evaluation.json"
    words = [
        "evaluate",
        "--studies",
        studies,
        "--cases",
        "two",
        "--out",
        path,
        "-k",
        1,
        "--no-hd95",
        "--model",
        tiny_model,
        *FAST,
    ]
    run(*words, "--structures", "hepatic parenchyma", "kidney, left")
    assert set(json.loads(path.read_text())["summary"]["single"]["dice"]) == {"liver", "left kidney"}
    run(*words, "--structures", "liver")
    assert set(json.loads(path.read_text())["summary"]["single"]["dice"]) == {"liver"}


def test_evaluate_refuses_unknown_cases_before_it_computes(studies, tiny_model, tmp_path):
    _, err = run(
        "evaluate", "--studies", studies, "--cases", "four", "--out", tmp_path / "e.json", "--model", tiny_model, code=2
    )
    assert "there is no image four" in err
    assert not (tmp_path / "e.json").exists()


def test_prompts_lists_the_structures_and_their_words(tiny_model):
    out, _ = run("prompts", "--model", tiny_model)
    assert all(name in out for name in STRUCTURES)
    assert "hepatic parenchyma" in out
    entries = json.loads(run("prompts", "--json", "--model", tiny_model)[0])
    assert [entry["structure"] for entry in entries] == list(STRUCTURES)


def test_prompts_says_what_a_prompt_means(tiny_model):
    assert run("prompts", "both kidneys and liver", "--model", tiny_model)[0].split("\n")[:3] == [
        "right kidney",
        "left kidney",
        "liver",
    ]
    assert "Did you mean 'spleen'" in run("prompts", "spline", "--model", tiny_model, code=2)[1]


def test_prompts_works_without_a_model(tmp_path):
    out, err = run("prompts", "--model", tmp_path)
    assert "pancreas" in out
    assert err


@pytest.mark.parametrize("command", ["serve", "predict", "evaluate", "prompts"])
def test_every_command_explains_itself(command):
    out, _ = run(command, "--help")
    assert len(out.splitlines()) > 8


def test_help_is_quick_because_nothing_heavy_is_imported():
    script = (
        "import sys; import progidiff.cli.main; print(sorted({'torch', 'diffusers', 'monai', 'monailabel', "
        "'matplotlib'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, encoding="utf-8", check=True, env=os.environ
    )
    assert finished.stdout.strip() == "[]"


def test_the_version_is_that_of_the_package():
    import progidiff

    assert run("--version")[0] == f"progidiff {progidiff.__version__}\n"


def test_what_stands_for_an_image_in_the_log_can_be_looked_up(tmp_path: Path):
    from progidiff.logs import Names, find_key_file, open_key

    _, error = run("log-name", "a", "--studies", tmp_path, code=2)
    assert "no server with these studies has hidden names" in error
    key = open_key(find_key_file(tmp_path / ".progidiff"))
    printed, _ = run("log-name", "scan.nii.gz", "Doe Jane", "--studies", tmp_path)
    names = Names(key)
    assert printed == f"{names.pseudonym('scan')}\tscan.nii.gz\n{names.pseudonym('Doe Jane')}\tDoe Jane\n"


def test_a_backup_is_made_and_restored_by_two_commands(tmp_path: Path):
    studies, users = tmp_path / "studies", tmp_path / "users.json"
    (studies / ".progidiff" / "sessions").mkdir(parents=True)
    (studies / ".progidiff" / "sessions" / "session.key").write_bytes(b"k" * 32)
    users.write_text("{}")
    archive, restored = tmp_path / "backup.tar", tmp_path / "restored"
    words = ("backup", "--studies", studies, "--out", archive)
    _, error = run(*words, "--secrets", tmp_path / "gone", code=2)
    assert "There is no" in error
    _, told = run(*words, "--secrets", users)
    assert told == f"2 files in {archive}\n"
    run("restore", archive, "--to", restored)
    assert (restored / "secrets" / "users.json").read_text() == "{}"
    assert (restored / "store" / "sessions" / "session.key").read_bytes() == b"k" * 32
    _, error = run("restore", archive, "--to", restored, code=2)
    assert "is not empty" in error
