"""Which images there are: tables and folders, good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from progidiff.errors import NotFoundError, RequestError
from progidiff.evaluation.prelabel import Item
from progidiff.prelabelling.sources import check_there, find_images, read_manifest
from support.series import write_series

ROWS = [
    {"id": "one", "image": "a/scan.nii.gz", "modality": "ct"},
    {"id": "", "image": "s3://bucket/b.nii", "modality": ""},
]


def write_table(file: Path) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        comma = "\t" if file.suffix == ".tsv" else ","
        file.write_text("\n".join(comma.join(row) for row in [ROWS[0], *(row.values() for row in ROWS)]))
    return file


@pytest.mark.parametrize("name", ("m.csv", "m.tsv", "m.jsonl", "m.parquet"))
def test_a_table_names_images_relative_to_itself(tmp_path: Path, name: str):
    assert read_manifest(str(write_table(tmp_path / name))) == [
        Item("one", f"{tmp_path}/a/scan.nii.gz", "CT"),
        Item("b", "s3://bucket/b.nii"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\nx.nii.gz\n", "columns path. 'image' is needed"),
        ("image\n", "names no image"),
        ("id,image\na,x.nii\na,y.nii\n", "id 'a' in rows 1 and 2"),
        ("id,image\na,x.nii\nb,\n", "Row 2 .* names no image"),
        ("image,modality\nx.nii,PT\n", "Row 1 .* Column modality"),
        ("id,image\n../x,x.nii\n", "Row 1 .* cannot name an image"),
        ("image\nx.nii,y.nii\n", "more cells than the header"),
        ('image\n"x.nii\n', "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_with_the_row(tmp_path: Path, text: str, message: str):
    file = tmp_path / "m.csv"
    file.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_manifest(str(file))


def test_tables_of_other_kinds_places_and_contents_are_refused(tmp_path: Path):
    with pytest.raises(NotFoundError, match="nothing at"):
        read_manifest(str(tmp_path / "none.csv"))
    for name, content, message in (
        ("m.xlsx", b"PK", "must end in one of .csv"),
        ("m.csv", b"image\n\xff\xfe\n", "as UTF-8"),
        ("m.parquet", b"image", "cannot be read"),
        ("m.jsonl", b"[1]", "must be an object"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match=message):
            read_manifest(str(tmp_path / name))
    with pytest.raises(NotFoundError, match="None of the first 2 images"):
        check_there([Item("a", str(tmp_path / "a.nii")), Item("b", str(tmp_path / "b.nii"))])
    check_there([Item("a", str(tmp_path / "a.nii")), Item("m", str(tmp_path / "m.csv"))])


def test_a_column_that_nobody_reads_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "m.csv").write_text("image,modalty\nx.nii,CT\n")
    assert read_manifest(str(tmp_path / "m.csv")) == [Item("x", f"{tmp_path}/x.nii")]
    assert "modalty" in caplog.text


def test_volumes_and_series_are_found_below_a_folder_and_labels_are_none(tmp_path: Path):
    for name in ("x.nii.gz", "p1/ct.nii.gz", "p1/notes.txt", "labels/original/x.nii.gz", ".hidden/y.nii", "out/z.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "p1" / "ct.json").write_text('{"modality": "MR"}')
    series = write_series(tmp_path / "p2" / "series")
    for number, file in enumerate(sorted(series.iterdir())):
        file.rename(file.with_name(f"1.2.{number}"))  # As many archives call them.
    assert find_images(str(tmp_path), str(tmp_path / "out")) == [
        Item("p1__ct", f"{tmp_path}/p1/ct.nii.gz", sidecar=f"{tmp_path}/p1/ct.json"),
        Item("p2__series", f"{tmp_path}/p2/series"),
        Item("x", f"{tmp_path}/x.nii.gz"),
    ]
    (tmp_path / "x.nii").write_bytes(b"")
    with pytest.raises(RequestError, match="would both be called 'x'"):
        find_images(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="No image lies below"):
        find_images(str(tmp_path / "empty"))
    with pytest.raises(NotFoundError, match="nothing at"):
        find_images(str(tmp_path / "none"))
