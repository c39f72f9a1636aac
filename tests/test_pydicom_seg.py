"""The module that stands where MONAI Label imports `pydicom_seg`."""

from __future__ import annotations

from pathlib import Path

import pytest
from monailabel.datastore.utils import convert

import pydicom_seg
from progidiff.errors import ProGiDiffError
from support.segmentations import make_masks, make_seg
from support.series import AXIAL, make_volume


def test_the_host_imports_ours():
    assert convert.pydicom_seg is pydicom_seg
    assert Path(pydicom_seg.__file__).parent == Path(__file__).parents[1] / "lib"


def test_a_route_of_the_host_that_really_calls_it_is_told_what_to_use(tmp_path: Path):
    volume = make_volume(AXIAL)
    make_seg(volume, make_masks(volume)).save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    with pytest.raises(ProGiDiffError, match=r"'MultiClassReader'.*highdicom"):
        convert.dicom_seg_to_itk_image(str(tmp_path / "seg.dcm"))
    with pytest.raises(ProGiDiffError, match=r"'template'.*highdicom"):
        pydicom_seg.template.from_dcmqi_metainfo({})


def test_python_asks_it_what_it_asks_every_module():
    assert not hasattr(pydicom_seg, "__path__")
    with pytest.raises(AttributeError, match="no attribute '_reader'"):
        _ = pydicom_seg._reader
