"""Options of the server and of a request: what is read, what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from progidiff.errors import RequestError
from progidiff.proposals.request import InferOptions
from progidiff.server.options import ServerOptions
from progidiff.storage.state import default_store


def read(**params: Any) -> InferOptions:
    return InferOptions.from_params({"prompt": "liver", **params}, {}, 16, ["base@1", "other@2"])


def test_defaults_of_the_widgets_fill_in_what_was_not_sent():
    defaults = {
        "prompt": "spleen",
        "num_proposals": 3,
        "show": ["consensus", "best"],
        "steps": 4,
        "adapter": ["base@1"],
        "modality": ["auto", "CT"],
    }
    options = InferOptions.from_params({"seed": 7}, defaults, 16, ["base@1"])
    assert (options.prompt, options.num_proposals, options.show, options.steps, options.seed) == (
        "spleen",
        3,
        "consensus",
        4,
        7,
    )
    assert (options.adapter, options.modality, options.save_original, options.result_extension) == (
        "base@1",
        None,
        False,
        ".nii.gz",
    )


def test_numbers_and_booleans_are_read_from_text_as_slicer_sends_them():
    options = read(num_proposals="4", steps=" 6 ", seed="12", allow_free_text="true", save_original="False", show="3")
    assert (options.num_proposals, options.steps, options.seed, options.show) == (4, 6, 12, "3")
    assert options.allow_free_text
    assert not options.save_original


def test_an_untouched_choice_arrives_as_the_whole_list_and_means_its_first_entry():
    options = read(show=["consensus", "best", "1"], modality=["auto", "CT", "MR"], adapter=["base@1", "other@2"])
    assert (options.show, options.modality, options.adapter) == ("consensus", None, "base@1")


def test_small_islands_are_dropped_unless_the_request_or_the_server_says_otherwise():
    assert read().clean_up == "small"
    assert read(clean_up="Largest").clean_up == "largest"
    assert (
        InferOptions.from_params({"prompt": "liver"}, {"clean_up": ["off", "small", "largest"]}, 16, []).clean_up
        == "off"
    )
    assert ServerOptions.from_conf({"clean_up": "off"}, "studies").clean_up == "off"
    with pytest.raises(RequestError, match="--conf clean_up"):
        ServerOptions.from_conf({"clean_up": "huge"}, "studies")


def test_several_prompts_are_one_that_names_them_all():
    assert read(prompt=["liver", "left kidney"]).prompt == "liver; left kidney"


@pytest.mark.parametrize(
    ("sent", "prompt"), [([6, 3], "liver; left kidney"), ("6, 3", "liver; left kidney"), (1, "spleen")]
)
def test_label_ids_as_ohif_sends_them_are_a_prompt_and_win_over_the_text(sent: object, prompt: str):
    assert read(label_prompt=sent, prompt="aorta").prompt == prompt
    assert read(label_prompt=sent).ignored == ()


def test_no_label_ids_leave_the_prompt_as_it_is():
    for nothing in ([], "", None):
        assert read(label_prompt=nothing).prompt == "liver"


@pytest.mark.parametrize("sent", [[0], [14], ["liver"], "6,x", [[6]], {}])
def test_label_ids_that_are_none_are_refused_with_their_range(sent: object):
    with pytest.raises(RequestError, match="Option label_prompt is .* whole number from 1 to 13"):
        read(label_prompt=sent)


def test_parameters_of_other_clients_are_named_as_ignored():
    assert read(client_id="slicer", result_dtype="uint8").ignored == ("client_id", "result_dtype")


@pytest.mark.parametrize(
    "value", ["abc", "", 0, -1, 17, 1000, 2.5, True, None, [4], {}, "9" * 5000, float("nan"), float("inf")]
)
def test_a_senseless_number_of_proposals_is_refused_with_its_range(value: object):
    if value is None:
        assert read(num_proposals=None).num_proposals == 4
        return
    with pytest.raises(RequestError, match="num_proposals is .* whole number from 1 to 16"):
        read(num_proposals=value)


@pytest.mark.parametrize(
    "name,value",
    [("steps", 0), ("steps", "fast"), ("steps", 101), ("seed", -1), ("seed", "x"), ("seed", 2**32), ("seed", 1.5)],
)
def test_steps_and_seed_are_refused_out_of_range(name: str, value: object):
    with pytest.raises(RequestError, match=f"Option {name} is .* must be a whole number"):
        read(**{name: value})


@pytest.mark.parametrize("value", ["worst", "0", -1, True, {"a": 1}, "1.5", "²", "9" * 5000])
def test_an_unknown_thing_to_show_is_refused(value: object):
    with pytest.raises(RequestError, match="Option show is"):
        read(show=value)


def test_showing_a_proposal_beyond_k_says_how_many_there_are():
    with pytest.raises(RequestError, match="Proposal 5 cannot be shown, only 4 are asked for. Raise num_proposals"):
        read(num_proposals=4, show="5")


@pytest.mark.parametrize("name", ["image", "model", "device", "session_id", "model_dir", "backbone", "store"])
def test_what_the_server_decides_cannot_be_set_by_a_request(name: str):
    with pytest.raises(RequestError, match=f"Option {name} cannot be set by a request"):
        read(**{name: "/etc/passwd"})


@pytest.mark.parametrize(
    "name,value",
    [
        ("modality", "PET"),
        ("adapter", "mine@9"),
        ("result_extension", ".png"),
        ("allow_free_text", "perhaps"),
        ("clean_up", "medium"),
        ("guidance_scale", "a lot"),
    ],
)
def test_other_malformed_options_are_refused_by_name(name: str, value: object):
    with pytest.raises(RequestError, match=f"Option {name} is"):
        read(**{name: value})


@pytest.mark.parametrize("value", [5, {"a": "b"}, ["liver", 3]])
def test_a_prompt_that_is_no_text_is_refused(value: object):
    with pytest.raises(RequestError, match="Option prompt is .* must be text"):
        read(prompt=value)


def test_a_request_without_a_prompt_and_without_a_default_says_what_to_write():
    with pytest.raises(RequestError, match="Option prompt is missing"):
        InferOptions.from_params({}, {}, 16, [])


def test_proposals_are_kept_beside_the_studies_unless_they_are_remote(tmp_path: Path):
    assert ServerOptions.from_conf({}, str(tmp_path)).store == tmp_path / ".progidiff"
    assert default_store("http://127.0.0.1:8042/dicom-web") != default_store("http://127.0.0.1:8043/dicom-web")
    assert default_store("https://pacs/dicom-web").parent == Path.home() / ".cache" / "progidiff"


def test_server_options_are_read_from_their_text(tmp_path: Path):
    conf = {
        "device": "CUDA:1",
        "model_dir": str(tmp_path),
        "backbone": "some/hub-id",
        "max_proposals": "8",
        "store_gb": "0.5",
    }
    options = ServerOptions.from_conf({**conf, "store": str(tmp_path / "kept")}, "/studies")
    assert (options.device, options.model_dir, options.backbone) == ("cuda:1", tmp_path, "some/hub-id")
    assert (options.max_proposals, options.store, options.store_gb) == (8, tmp_path / "kept", 0.5)
    assert options.cpu_fallback is False
    assert ServerOptions.from_conf({"cpu_fallback": "true"}, "/studies").cpu_fallback is True


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("device", "gpu0", "must be auto, cpu, mps, cuda"),
        ("devices", "cuda:0,gpu1", "has 'gpu1'; it must be a comma-separated list of devices, for example"),
        ("devices", "cuda:1,cuda:1", "cuda:1 is named twice"),
        ("devices", "cuda,cuda:0", "cuda, which is cuda:0, is named twice"),
        ("devices", "cpu,cuda:7", "and no cuda:7"),
        ("devices", ",", "names none"),
        ("warm_up", "perhaps", "--conf warm_up"),
        ("model_dir", "/nowhere/at/all", "no such folder"),
        ("max_proposals", "many", "--conf max_proposals is 'many'"),
        ("max_waiting", "31", "from 0 to 30"),
        ("store_gb", "nan", "must be a number"),
        ("cpu_fallback", "perhaps", "must be true or false"),
    ],
)
def test_a_senseless_server_option_is_refused_at_start(name: str, value: str, message: str, tmp_path: Path):
    with pytest.raises(RequestError, match=message):
        ServerOptions.from_conf({name: value}, str(tmp_path))


def test_several_devices_have_names_and_trainings_take_the_last_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    several = ServerOptions.from_conf({"devices": "CUDA:1, cuda:0"}, "/studies")
    assert several.list_devices() == {"cuda:1": "cuda:1", "cuda:0": "cuda:0"}
    assert several.training_device == "cuda:0"
    assert ServerOptions.from_conf({"device": "cuda:1"}, "/studies").list_devices() == {"cuda:1": "cuda:1"}
    assert ServerOptions.from_conf({}, "/studies").list_devices() == {"the device": None}
    every = ServerOptions.from_conf({"devices": "all", "device": "auto"}, "/studies")
    assert every.devices == ("cuda:0", "cuda:1", "cuda:2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(RequestError, match="torch sees no CUDA device here"):
        ServerOptions.from_conf({"devices": "all"}, "/studies")
    with pytest.raises(RequestError, match="the same thing twice"):
        ServerOptions.from_conf({"devices": "cpu,cpu", "device": "cpu"}, "/studies")
