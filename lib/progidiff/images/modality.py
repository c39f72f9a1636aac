"""The modalities: one row each, which says how it is written, windowed, drawn and sent as DICOM."""

from __future__ import annotations

from dataclasses import dataclass

from progidiff.errors import RequestError

_AUTO = "auto"
"""What stands for "find out" in requests."""


@dataclass(frozen=True)
class Preset:
    """A named window of the review page.

    Attributes:
        name: For people.
        window: The intensities shown as black and white.
    """

    name: str
    window: tuple[float, float]


@dataclass(frozen=True)
class Modality:
    """One kind of volume.

    Attributes:
        name: As DICOM has it.
        spellings: Others that requests and sidecars may use, upper case.
        window: The intensities that the networks see as -1 and 1; None: percentiles of each image.
        body_above: Intensity above which a voxel is body; None: found in each image.
        presets: Windows that the review page offers.
        sop_class_uid: What its slices are in DICOM.
        image_type: Third value of ImageType.
        rescale_type: What its intensities are in DICOM: "HU" or "US" (unspecified).
        is_magnetic: Whether its slices carry DICOM's attributes of magnetic resonance, else those of X-rays.
        bias_field: Strength of the smooth shading that trainings add, 0 for none.
    """

    name: str
    spellings: tuple[str, ...]
    window: tuple[float, float] | None
    body_above: float | None
    presets: tuple[Preset, ...]
    sop_class_uid: str
    image_type: str
    rescale_type: str
    is_magnetic: bool
    bias_field: float


MODALITIES: tuple[Modality, ...] = (
    Modality(
        name="CT",
        spellings=(),
        # Soft tissue in HU, the window that the TransUNet / BTCV literature uses.
        window=(-125.0, 275.0),
        # Below fat (about -100 HU), above air even where it was clipped at -125 HU.
        body_above=-120.0,
        presets=(
            Preset("soft tissue", (-160.0, 240.0)),
            Preset("liver", (-10.0, 170.0)),
            Preset("lung", (-1350.0, 150.0)),
            Preset("bone", (-600.0, 1400.0)),
        ),
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        image_type="AXIAL",
        rescale_type="HU",
        is_magnetic=False,
        bias_field=0.0,
    ),
    Modality(
        name="MR",
        spellings=("MRI",),
        window=None,
        body_above=None,
        presets=(),
        sop_class_uid="1.2.840.10008.5.1.4.1.1.4",
        image_type="OTHER",
        rescale_type="US",
        is_magnetic=True,
        bias_field=0.3,
    ),
)


def list_modalities() -> tuple[str, ...]:
    """The names.

    Example:
        >>> list_modalities()
        ('CT', 'MR')
    """
    return tuple(row.name for row in MODALITIES)


def find_modality(value: str) -> Modality | None:
    """The row of a name or another spelling, in any case; None if there is none.

    Example:
        >>> find_modality("mri").name, find_modality("PT")
        ('MR', None)
    """
    text = value.strip().upper()
    return next((row for row in MODALITIES if text == row.name.upper() or text in row.spellings), None)


def get_modality(name: str) -> Modality:
    """The row of a name that was checked before.

    Raises:
        RequestError: if there is none.
    """
    row = find_modality(name)
    if row is None:
        raise RequestError(f"The modality is '{name}'; it must be {' or '.join(list_modalities())}.")
    return row


def check_modality(value: object, where: str) -> str | None:
    """The name of a modality that was asked for.

    Args:
        value: Any spelling; None, "", "none" or "auto" to find out.
        where: What to call it in the message.

    Returns:
        None to find out.

    Raises:
        RequestError: if it is no modality that is known here.
    """
    text = "" if value is None else str(value).strip()
    if text.upper() in ("", _AUTO.upper(), "NONE"):
        return None
    row = find_modality(text)
    if row is None:
        names = " or ".join(list_modalities())
        raise RequestError(f"{where} is '{value}'; it must be {names} (or {_AUTO}, to find out from the image).")
    return row.name
