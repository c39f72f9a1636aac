"""Coded terms of what is drawn: what DICOM and 3D Slicer write beside a name, so that any program knows what it is.

The structures of the table (`structures.TABLE`) have theirs there. Here are those of TotalSegmentator's other classes,
in SNOMED CT as its own table has them: labels with these names come in from elsewhere, keep their names, and go out
coded. The model knows none of them by training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from progidiff.prompts.structures import CATEGORY, LEFT, RIGHT, UNKNOWN, Code, find_structure


@dataclass(frozen=True)
class Terms:
    """What is drawn, in codes.

    Attributes:
        category: Property category of a segment.
        type: Property type.
        modifier: Of the type: its side; None for none.
        region: Where it lies, for what is no structure of the body itself; None for none.
        region_modifier: Side of the region; None for none.
    """

    category: Code
    type: Code
    modifier: Code | None = None
    region: Code | None = None
    region_modifier: Code | None = None


_ALTERED = Code("49755003", "Morphologically Altered Structure")
_CYST = Code("367643001", "Cyst")
_SIDES = {"left": LEFT, "right": RIGHT}

_PAIRS: Mapping[str, Code] = {
    "lung_upper_lobe_{side}": Code("45653009", "Upper lobe of lung"),
    "lung_lower_lobe_{side}": Code("90572001", "Lower lobe of lung"),
    "iliac_artery_{side}": Code("73634005", "Common iliac artery"),
    "iliac_vena_{side}": Code("46027005", "Common iliac vein"),
    "humerus_{side}": Code("85050009", "Humerus"),
    "scapula_{side}": Code("79601000", "Scapula"),
    "clavicula_{side}": Code("51299004", "Clavicle"),
    "femur_{side}": Code("71341001", "Femur"),
    "hip_{side}": Code("29836001", "Hip"),
    "gluteus_maximus_{side}": Code("181674001", "Gluteus maximus muscle"),
    "gluteus_medius_{side}": Code("78333006", "Gluteus medius muscle"),
    "gluteus_minimus_{side}": Code("75297007", "Gluteus minimus muscle"),
    "autochthon_{side}": Code("244849004", "Deep muscle of back"),
    "iliopsoas_{side}": Code("68455001", "Iliopsoas muscle"),
    "subclavian_artery_{side}": Code("29700009", "Subclavian artery"),
    "common_carotid_artery_{side}": Code("32062004", "Common carotid artery"),
    "brachiocephalic_vein_{side}": Code("8887007", "Brachiocephalic vein"),
    "rib_{side}_1": Code("48535007", "First rib"),
    "rib_{side}_2": Code("78247007", "Second rib"),
    "rib_{side}_3": Code("25888004", "Third rib"),
    "rib_{side}_4": Code("25523003", "Fourth rib"),
    "rib_{side}_5": Code("15339008", "Fifth rib"),
    "rib_{side}_6": Code("59558009", "Sixth rib"),
    "rib_{side}_7": Code("24915002", "Seventh rib"),
    "rib_{side}_8": Code("5953002", "Eighth rib"),
    "rib_{side}_9": Code("22565002", "Ninth rib"),
    "rib_{side}_10": Code("77644006", "Tenth rib"),
    "rib_{side}_11": Code("58830002", "Eleventh rib"),
    "rib_{side}_12": Code("43993008", "Twelfth rib"),
}
"""TotalSegmentator's classes of which there are a left and a right one."""

_SINGLE: Mapping[str, Code] = {
    "lung_middle_lobe_right": Code("72481006", "Middle lobe of right lung"),
    "trachea": Code("44567001", "Trachea"),
    "thyroid_gland": Code("69748006", "Thyroid gland"),
    "small_bowel": Code("30315005", "Small Intestine"),
    "duodenum": Code("38848004", "Duodenum"),
    "colon": Code("71854001", "Colon"),
    "urinary_bladder": Code("89837001", "Urinary bladder"),
    "prostate": Code("41216001", "Prostate"),
    "heart": Code("80891009", "Heart"),
    "atrial_appendage_left": Code("68786006", "Auricular appendage"),
    "pulmonary_vein": Code("122972007", "Pulmonary vein"),
    "brachiocephalic_trunk": Code("12691009", "Brachiocephalic artery"),
    "superior_vena_cava": Code("48345005", "Superior vena cava"),
    "spinal_cord": Code("2748008", "Spinal cord"),
    "brain": Code("12738006", "Brain"),
    "skull": Code("89546000", "Skull"),
    "sternum": Code("56873002", "Sternum"),
    "costal_cartilages": Code("50016007", "Costal cartilage"),
    "sacrum": Code("54735007", "Sacrum"),
    "vertebrae_S1": Code("65985001", "S1 vertebra"),
    "vertebrae_L5": Code("49668003", "L5 vertebra"),
    "vertebrae_L4": Code("11994002", "L4 vertebra"),
    "vertebrae_L3": Code("36470004", "L3 vertebra"),
    "vertebrae_L2": Code("14293000", "L2 vertebra"),
    "vertebrae_L1": Code("66794005", "L1 vertebra"),
    "vertebrae_T12": Code("23215003", "T12 vertebra"),
    "vertebrae_T11": Code("12989004", "T11 vertebra"),
    "vertebrae_T10": Code("7610001", "T10 vertebra"),
    "vertebrae_T9": Code("82687006", "T9 vertebra"),
    "vertebrae_T8": Code("11068009", "T8 vertebra"),
    "vertebrae_T7": Code("62487009", "T7 vertebra"),
    "vertebrae_T6": Code("45296009", "T6 vertebra"),
    "vertebrae_T5": Code("56401006", "T5 vertebra"),
    "vertebrae_T4": Code("73071006", "T4 vertebra"),
    "vertebrae_T3": Code("1626008", "T3 vertebra"),
    "vertebrae_T2": Code("53733008", "T2 vertebra"),
    "vertebrae_T1": Code("64864005", "T1 vertebra"),
    "vertebrae_C7": Code("87391001", "C7 vertebra"),
    "vertebrae_C6": Code("36054005", "C6 vertebra"),
    "vertebrae_C5": Code("36978003", "C5 vertebra"),
    "vertebrae_C4": Code("5329002", "C4 vertebra"),
    "vertebrae_C3": Code("113205007", "C3 vertebra"),
    "vertebrae_C2": Code("39976000", "C2 vertebra"),
    "vertebrae_C1": Code("14806007", "C1 vertebra"),
}
"""Its classes of which there is one."""

_KIDNEY = Code("64033007", "Kidney")


def _build() -> dict[str, Terms]:
    found = {name: Terms(CATEGORY, code) for name, code in _SINGLE.items()}
    for pattern, code in _PAIRS.items():
        found |= {pattern.format(side=side): Terms(CATEGORY, code, modifier) for side, modifier in _SIDES.items()}
    found["atrial_appendage_left"] = Terms(CATEGORY, _SINGLE["atrial_appendage_left"], LEFT)
    for side, modifier in _SIDES.items():
        found[f"kidney_cyst_{side}"] = Terms(_ALTERED, _CYST, None, _KIDNEY, modifier)
    return {name.lower(): terms for name, terms in found.items()}


_TERMS = _build()


def find_terms(name: str) -> Terms | None:
    """The codes of a structure of the table, or of a class of TotalSegmentator; None if neither is called so.

    Example:
        >>> find_terms("left kidney").modifier.meaning, find_terms("vertebrae_L5").type.value, find_terms("my tumour")
        ('Left', '49668003', None)
    """
    row = find_structure(name)
    if row is not None:
        return Terms(CATEGORY, row.code, row.laterality)
    return _TERMS.get("_".join(name.lower().split()))


def get_terms(name: str) -> Terms:
    """The codes of anything that is drawn: those of `find_terms`, or that it is a structure of the body.

    Example:
        >>> get_terms("my tumour").type.meaning
        'Anatomical structure'
    """
    return find_terms(name) or Terms(CATEGORY, UNKNOWN)
