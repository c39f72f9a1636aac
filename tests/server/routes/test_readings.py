"""Double reading on the real app: who gets which image, whose label goes where, and what is decided."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from starlette.testclient import TestClient

from progidiff.images.reading import load_volume
from support.apps import connect, open_app
from support.phantoms import write_phantom

NAMES = ("anna", "ben", "carl")
CHIEF = "chief"
SHAPE = (30, 32, 6)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[dict[str, TestClient]]:
    folder = tmp_path_factory.mktemp("readings")
    studies = folder / "studies"
    studies.mkdir()
    for seed, name in enumerate(("first", "second")):
        write_phantom(studies / f"{name}.nii.gz", shape=SHAPE, seed=seed)
    tokens = folder / "tokens"
    lines = [f"{name}:annotate:{name * 12}\n" for name in NAMES]
    tokens.write_text("".join([*lines, f"{CHIEF}:administer:{CHIEF * 12}\n"]))
    tokens.chmod(0o600)
    with open_app(studies, tiny_model, "token_file", str(tokens), "double_reading", "on"):
        yield {name: connect(headers={"Authorization": f"Bearer {name * 12}"}) for name in (*NAMES, CHIEF)}


def ask(client: TestClient, who: str) -> dict[str, Any]:
    answer = client.post("/activelearning/random", json={"client_id": who})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def save(client: TestClient, image: str, mask: np.ndarray, tag: str = "final", status: int = 200) -> dict[str, Any]:
    affine = np.array([[-5.5, 0, 0, 170], [0, 6.5, 0, -160], [0, 0, 5.0, 300], [0, 0, 0, 1.0]])
    packed = nibabel.Nifti1Image(mask.astype(np.uint8) * 6, affine).to_bytes()
    answer = client.put(
        "/datastore/label",
        params={"image": image, "tag": tag},
        files={"label": ("label.nii", packed)},
        data={"params": '{"structures": ["liver"]}'},
    )
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def test_an_image_is_read_by_two_people_and_decided_by_a_third(people: dict[str, TestClient]):
    anna, ben, carl = (people[name] for name in NAMES)
    masks = {name: np.zeros(SHAPE, bool) for name in ("anna", "ben")}
    masks["anna"][5:15, 5:15, 1:4] = True
    masks["ben"][5:15, 5:20, 1:3] = True

    image = ask(anna, "anna")["id"]
    save(anna, image, masks["anna"])
    other = "second" if image == "first" else "first"
    assert ask(anna, "anna")["id"] == other  # not the same again
    assert ask(ben, "ben")["id"] == image  # the other one is with anna
    # Ben sees nothing of Anna's: neither on the page nor as a reading.
    page = ben.get(f"/progidiff/review/{image}").json()
    assert (page["label"], page["annotated"]) == (None, {})
    assert ben.get(f"/progidiff/readings/{image}").json()["readings"] == []
    assert ben.get(f"/progidiff/readings/{image}/anna/label/2").status_code == 409
    assert carl.post(f"/progidiff/readings/{image}/decide", json={"structures": {"liver": "anna"}}).status_code == 409
    save(ben, image, masks["ben"])

    told = carl.get(f"/progidiff/readings/{image}").json()
    assert [reading["user"] for reading in told["readings"]] == ["anna", "ben"]
    (liver,) = told["agreement"]
    both = 2 * (masks["anna"] & masks["ben"]).sum() / (masks["anna"].sum() + masks["ben"].sum())
    assert liver["dice"] == pytest.approx(both, abs=1e-4)
    assert {entry["index"]: entry["dice"] for entry in liver["slices"]} == {3: 0, 1: 0.8, 2: 0.8}
    assert (told["may_decide"], anna.get(f"/progidiff/readings/{image}").json()["may_decide"]) == (True, False)
    assert ask(carl, "carl")["id"] == image
    # Nothing counts yet, and the readers cannot decide.
    assert carl.get("/progidiff/annotations", params={"image": image}).json()["annotated_slices"][image] == []
    refused = anna.post(f"/progidiff/readings/{image}/decide", json={"structures": {"liver": "anna"}})
    assert (refused.status_code, "somebody else decides" in refused.json()["detail"]) == (409, True)
    for wrong, reason in (({"liver": "dora"}, "'dora' read nothing"), ({"spleen": "anna"}, "did not read 'spleen'")):
        answer = carl.post(f"/progidiff/readings/{image}/decide", json={"structures": wrong})
        assert (answer.status_code, reason in answer.json()["detail"]) == (422, True), answer.text

    decision = {"structures": {"liver": "anna"}, "slices": {"2": {"liver": "ben"}}}
    answer = carl.post(f"/progidiff/readings/{image}/decide", json=decision)
    assert answer.status_code == 200, answer.text
    label = carl.get("/datastore/label", params={"label": image, "tag": "final"}).content
    drawn = np.asarray(nibabel.Nifti1Image.from_bytes(_unpack(label)).dataobj) > 0
    expected = masks["anna"].copy()
    expected[:, :, 2] = masks["ben"][:, :, 2]
    assert np.array_equal(drawn, expected)

    saves = carl.get("/progidiff/annotations", params={"image": image}).json()["annotations"]
    assert [(entry["user"], entry["tag"]) for entry in saves] == [
        ("carl", "final"),
        ("ben", "reading-ben"),
        ("anna", "reading-anna"),
    ]
    # A reader who goes on changes the own reading, and not what was decided.
    save(anna, image, ~masks["anna"])
    assert carl.get("/datastore/label", params={"label": image, "tag": "final"}).content == label


def test_each_person_has_a_worklist_of_their_own(people: dict[str, TestClient]):
    # Which image anna was given first, and read, is up to chance.
    listed = people["anna"].get("/progidiff/worklist").json()["entries"]
    image = next(entry["image"] for entry in listed if entry["state"] == "todo")
    save(people["ben"], image, np.ones(SHAPE, bool))
    states = {
        name: {entry["image"]: entry["state"] for entry in client.get("/progidiff/worklist").json()["entries"]}
        for name, client in people.items()
    }
    assert states["ben"][image] == "done"  # a viewer's label of the whole volume
    assert states["anna"][image] == "todo"
    only = people["anna"].get("/progidiff/worklist", params={"state": "todo", "search": image[:3].upper()}).json()
    assert ([entry["image"] for entry in only["entries"]], only["found"], only["images"]) == ([image], 1, 2)
    assert only["heading"] == "Random choice, a third of it where structures are predicted"
    assert ".nrrd" in only["formats"]


def test_who_is_done_with_an_image_says_so_and_takes_it_back(people: dict[str, TestClient]):
    anna = people["anna"]
    for is_done in (True, False):
        answer = anna.post("/progidiff/annotations/second/done", params={"is_done": is_done})
        assert (answer.status_code, answer.json()["is_done"]) == (200, is_done)
        assert anna.get("/progidiff/review/second").json()["is_done"] is is_done
    assert people["carl"].get("/progidiff/review/second").json()["is_done"] is False


def test_an_image_in_a_zip_file_is_added(people: dict[str, TestClient], tmp_path: Path):
    source = write_phantom(tmp_path / "inner.nii.gz", shape=SHAPE, seed=9)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(source, "folder/inner.nii.gz")
    answer = people["anna"].put("/datastore/image", files={"file": ("packed.zip", packed.getvalue())})
    assert (answer.status_code, answer.json()["image"]) == (200, "packed"), answer.text
    kept = people["anna"].get("/datastore/image", params={"image": "packed"}).content
    (tmp_path / "kept.nii.gz").write_bytes(kept)
    assert np.array_equal(load_volume(tmp_path / "kept.nii.gz").array, load_volume(source).array)
    refused = people["anna"].put("/datastore/image", files={"file": ("packed.zip", b"no archive")})
    assert refused.status_code == 422
    assert "archive" in refused.json()["detail"]


def test_nobody_reaches_a_reading_of_somebody_else(people: dict[str, TestClient], tmp_path: Path):
    anna, ben, carl, chief = (people[name] for name in (*NAMES, CHIEF))
    image = write_phantom(tmp_path / "hidden.nii.gz", shape=SHAPE, seed=3)
    assert anna.put("/datastore/image", files={"file": (image.name, image.read_bytes())}).status_code == 200
    number = save(anna, "hidden", np.ones(SHAPE, bool))["annotation"]["sequence"]
    named = {"label": "hidden", "tag": "reading-anna"}
    asked = [
        ("GET", "/datastore/label", named),
        ("HEAD", "/datastore/label", {"image": "hidden", "tag": "reading-anna"}),
        ("GET", "/datastore/label/info", named),
        ("GET", f"/progidiff/annotations/hidden/{number}/label", {}),
    ]
    changes = [
        ("PUT", "/datastore/label/info", {"params": named, "data": {"info": '{"note": "x"}'}}),
        ("PUT", "/datastore/updatelabelinfo", {"params": named, "data": {"params": '{"note": "x"}'}}),
        ("POST", f"/progidiff/annotations/hidden/{number}/restore", {}),
    ]

    def see(client: TestClient) -> list[int]:
        return [client.request(method, path, params=query).status_code for method, path, query in asked]

    def list_tags(client: TestClient) -> tuple[set[str], set[str]]:
        listed = client.get("/datastore/", params={"output": "all"}).json()["objects"]["hidden"]["labels"]
        saves = client.get("/progidiff/annotations", params={"image": "hidden"}).json()["annotations"]
        return set(listed), {entry["tag"] for entry in saves}

    for other in (ben, carl):
        assert see(other) == [403] * 4
        assert list_tags(other) == (set(), set())
        assert [other.request(method, path, **more).status_code for method, path, more in changes] == [403] * 3
        assert save(other, "hidden", np.ones(SHAPE, bool), "reading-anna", 403)["error"] == "AccessError"
    assert see(anna) == see(chief) == [200] * 4
    assert list_tags(anna) == list_tags(chief) == ({"reading-anna"}, {"reading-anna"})

    # Who renames a structure renames it in the own reading; there is none yet.
    words = {"old": "liver", "new": "spleen"}
    assert ben.post("/progidiff/annotations/hidden/rename", json=words).status_code == 404
    save(ben, "hidden", np.zeros(SHAPE, bool))
    assert (see(ben), see(carl), see(anna)) == ([403] * 4, [200] * 4, [200] * 4)
    assert list_tags(carl)[1] == {"reading-anna", "reading-ben"}
    assert carl.post(f"/progidiff/annotations/hidden/{number}/restore").status_code == 403
    answer = anna.post("/progidiff/annotations/hidden/rename", json=words)
    assert answer.status_code == 200, answer.text
    assert "spleen" in anna.get("/progidiff/review/hidden").json()["annotated"]
    assert anna.post("/progidiff/annotations/hidden/undo").status_code == 200

    # What was decided is no reader's to change.
    decided = carl.post("/progidiff/readings/hidden/decide", json={"structures": {"liver": "ben"}})
    assert decided.status_code == 200, decided.text
    final = decided.json()["annotation"]["sequence"]
    assert anna.post(f"/progidiff/annotations/hidden/{final}/restore").status_code == 403
    assert carl.post(f"/progidiff/annotations/hidden/{final}/restore").status_code == 200


def _unpack(content: bytes) -> bytes:
    import gzip

    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
