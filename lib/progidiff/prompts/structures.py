"""The structures this program knows, one row each: a new structure, a synonym or a colour is a change of its row alone.

Everything that speaks of a structure reads it here: the parser and its hints, the ids of label maps, the colours of
pictures and pages, the codes of DICOM segmentations, and what training shows to the text encoder.

Phrases are written as a person writes them; case, accents, hyphens and underscores do not matter, see
`progidiff.prompts.words.split_words`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["", "left", "right"]
Language = Literal["de", "fr", "es", "it", "zh"]


@dataclass(frozen=True)
class Code:
    """A coded concept of DICOM.

    Attributes:
        value: Code value.
        meaning: For people.
        scheme: Coding scheme designator; "SCT" is SNOMED CT.
    """

    value: str
    meaning: str
    scheme: str = "SCT"


RIGHT, LEFT = Code("24028007", "Right"), Code("7771000", "Left")
CATEGORY = Code("123037004", "Anatomical Structure")
"""Of every structure, from DICOM's context group 7150."""
UNKNOWN = Code("91723000", "Anatomical structure")
"""The type of a structure that the table does not know."""


@dataclass(frozen=True)
class Structure:
    """One row.

    Attributes:
        name: What answers, files and pages call it; what the text encoder reads for all its synonyms.
        label_id: In label maps of this program, 1..255; never given to another structure later.
        color: "#rrggbb", the same in every picture.
        code: Of DICOM segmentations; of one of a pair that of the organ, see `laterality`.
        totalsegmentator: What TotalSegmentator calls it.
        has_own_code: Whether `code` means nothing else; otherwise it is written and not read.
        side: Of a pair.
        nouns: Of a pair: words for the organ, which need a side; without one they mean both.
        training: Phrases that training shows to the text encoder; ``{side}`` stands for left or right.
        heldout: Phrases that training never shows, so that they measure whether the text encoder generalises.
        parsing: Understood by the parser only: abbreviations, plurals, bare adjectives, spellings that mean nothing to
            a text encoder.
        languages: The same in other languages.
    """

    name: str
    label_id: int
    color: str
    code: Code
    totalsegmentator: str = ""
    side: Side = ""
    nouns: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    parsing: tuple[str, ...] = ()
    languages: Mapping[Language, tuple[str, ...]] = field(default_factory=dict)
    has_own_code: bool = True

    @property
    def organ(self) -> str:
        """The name without the side."""
        return self.name.removeprefix(f"{self.side} ") if self.side else self.name

    @property
    def laterality(self) -> Code | None:
        """The modifier of `code`; None for what is no pair."""
        return {"": None, "left": LEFT, "right": RIGHT}[self.side]

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every phrase that means this structure alone, its name first."""
        others = [phrase for phrases in self.languages.values() for phrase in phrases]
        return tuple(
            dict.fromkeys(
                (self.name, *self.with_side(self.training), *self.with_side(self.heldout), *self.parsing, *others)
            )
        )

    def with_side(self, phrases: Iterable[str]) -> tuple[str, ...]:
        """Phrases with ``{side}`` filled in."""
        return tuple(phrase.format(side=self.side) for phrase in phrases)


_KIDNEY_NOUNS = (
    "kidney", "kidneys", "renal", "renal parenchyma", "renal organ", "renal organs", "renal tissue", "nephros",
    "kidney parenchyma", "Niere", "Nieren", "rein", "reins", "riñón", "riñones", "rene", "reni", "肾", "肾脏", "腎",
    "腎臟", "双肾", "双侧肾脏", "雙腎",
)  # fmt: skip
_KIDNEY_TRAINING = (
    "{side} renal parenchyma", "kidney on the {side}", "{side}-sided kidney", "{side} renal organ",
)  # fmt: skip
_KIDNEY_HELDOUT = (
    "{side} renal tissue", "kidney of the {side} side", "{side} whole kidney", "{side} nephros",
)  # fmt: skip
_ADRENAL_NOUNS = (
    "adrenal gland", "adrenal glands", "adrenal", "adrenals", "adrenal tissue", "adrenal body", "adrenal bodies",
    "suprarenal gland", "suprarenal glands", "suprarenal", "suprarenals", "suprarenal body", "glandula suprarenalis",
    "Nebenniere", "Nebennieren", "glande surrénale", "glandes surrénales", "surrénale", "surrénales",
    "glándula suprarrenal", "glándulas suprarrenales", "suprarrenal", "suprarrenales", "glándula adrenal",
    "glándulas adrenales", "ghiandola surrenale", "ghiandole surrenali", "surrene", "surreni", "肾上腺", "腎上腺",
    "双侧肾上腺",
)  # fmt: skip
_ADRENAL_TRAINING = (
    "{side} adrenal", "{side} suprarenal gland", "adrenal gland on the {side}", "{side}-sided adrenal gland",
)  # fmt: skip
_ADRENAL_HELDOUT = (
    "{side} suprarenal", "{side} adrenal tissue", "adrenal of the {side} side", "{side} adrenal body",
)  # fmt: skip
_KIDNEY, _ADRENAL = Code("64033007", "Kidney"), Code("23451007", "Adrenal gland")

TABLE: tuple[Structure, ...] = (
    Structure(
        "spleen", 1, "#d55fb0", Code("78961009", "Spleen"), "spleen",
        training=("splenic parenchyma", "splenic organ", "whole spleen"),
        heldout=("splenic tissue", "spleen parenchyma", "lien"),
        parsing=("splenic", "spleens"),
        languages={"de": ("Milz",), "fr": ("rate",), "es": ("bazo",), "it": ("milza",), "zh": ("脾", "脾脏", "脾臟")},
    ),
    Structure(
        "right kidney", 2, "#f2c14e", _KIDNEY, "kidney_right", "right", _KIDNEY_NOUNS,
        _KIDNEY_TRAINING, _KIDNEY_HELDOUT, parsing=("RK",),
        languages={
            "de": ("rechte Niere",), "fr": ("rein droit",), "es": ("riñón derecho",), "it": ("rene destro",),
            "zh": ("右肾", "右肾脏", "右侧肾脏", "右腎"),
        },
    ),
    Structure(
        "left kidney", 3, "#59d2fe", _KIDNEY, "kidney_left", "left", _KIDNEY_NOUNS,
        _KIDNEY_TRAINING, _KIDNEY_HELDOUT, parsing=("LK",),
        languages={
            "de": ("linke Niere",), "fr": ("rein gauche",), "es": ("riñón izquierdo",), "it": ("rene sinistro",),
            "zh": ("左肾", "左肾脏", "左侧肾脏", "左腎"),
        },
    ),
    Structure(
        "gallbladder", 4, "#3fae6b", Code("28231008", "Gallbladder"), "gallbladder",
        training=("gall bladder", "gallbladder lumen", "bile-filled gallbladder"),
        heldout=("cholecyst", "gallbladder with bile", "vesica biliaris"),
        parsing=("gallbladders", "gb", "vesica fellea"),
        languages={
            "de": ("Gallenblase",), "fr": ("vésicule biliaire", "vésicule"), "es": ("vesícula biliar", "vesícula"),
            "it": ("cistifellea", "colecisti"), "zh": ("胆囊", "膽囊"),
        },
    ),
    Structure(
        "esophagus", 5, "#f4b8a8", Code("32849002", "Esophagus"), "esophagus",
        training=("oesophagus", "esophageal tube", "distal esophagus"),
        heldout=("abdominal esophagus", "gullet", "food pipe"),
        parsing=(
            "esophageal", "oesophageal", "distal oesophagus", "abdominal oesophagus", "lower esophagus",
            "lower oesophagus",
        ),
        languages={
            "de": ("Speiseröhre", "Speiseroehre", "Ösophagus"), "fr": ("œsophage", "l'œsophage"),
            "es": ("esófago",), "it": ("esofago", "l'esofago"), "zh": ("食管", "食道"),
        },
    ),
    Structure(
        "liver", 6, "#c98a5b", Code("10200004", "Liver"), "liver",
        training=("hepatic parenchyma", "hepatic organ", "whole liver"),
        heldout=("hepatic tissue", "liver parenchyma", "hepar"),
        parsing=("hepatic", "liver tissue", "livers"),
        languages={
            "de": ("Leber",), "fr": ("foie",), "es": ("hígado",), "it": ("fegato",),
            "zh": ("肝", "肝脏", "肝臟"),
        },
    ),
    Structure(
        "stomach", 7, "#9d7be0", Code("69695003", "Stomach"), "stomach",
        training=("gastric lumen", "gastric organ", "stomach with contents"),
        heldout=("stomach lumen", "gaster", "gastric lumen and wall"),
        parsing=("gastric", "gastric wall and lumen", "stomach contents", "stomachs"),
        languages={
            "de": ("Magen",), "fr": ("estomac", "l'estomac"), "es": ("estómago",), "it": ("stomaco",), "zh": ("胃",),
        },
    ),
    Structure(
        "aorta", 8, "#ff3b3b", Code("15825003", "Aorta"), "aorta",
        training=("abdominal aorta", "aortic lumen", "descending aorta"),
        heldout=("aortic vessel", "aortic trunk", "main abdominal artery"),
        parsing=("aortic", "aorta abdominalis", "ao", "aortas"),
        languages={
            "de": ("Hauptschlagader", "Bauchaorta"), "fr": ("aorte", "l'aorte", "aorte abdominale"),
            "es": ("aorta abdominal",), "it": ("l'aorta", "aorta addominale"),
            "zh": ("主动脉", "腹主动脉", "主動脈"),
        },
    ),
    Structure(
        "inferior vena cava", 9, "#3f6bff", Code("64131007", "Inferior vena cava"), "inferior_vena_cava",
        training=("ivc", "vena cava inferior", "inferior caval vein"),
        heldout=("lower vena cava", "vena cava", "caval vein"),
        parsing=("inferior cava", "cava", "inf vena cava", "postcava"),
        languages={
            "de": ("untere Hohlvene", "Hohlvene"), "fr": ("veine cave inférieure", "veine cave", "VCI"),
            "es": ("vena cava inferior",), "it": ("vena cava inferiore",), "zh": ("下腔静脉", "下腔靜脈"),
        },
    ),
    Structure(
        # DICOM lists a SNOMED CT code for either vein and none for both: the code of one alone would be untrue of the
        # other.
        "portal and splenic veins", 10, "#37b8c8", Code("29092000", "Vein"), "portal_vein_and_splenic_vein",
        has_own_code=False,
        training=("portal vein and splenic vein", "portal vein", "splenic vein", "portal venous system"),
        heldout=("portosplenic veins", "splenoportal axis", "splenic and portal veins"),
        parsing=(
            "portal and splenic vein", "splenic and portal vein", "splenic vein and portal vein",
            "portal veins and splenic veins", "portal veins", "splenic veins", "portosplenic vein",
            "splenoportal veins", "splenoportal vein", "splenoportal confluence", "portosplenic confluence",
            "portal splenic confluence", "vena portae", "portal and splenic venous system",
            "portosplenic venous system",
        ),
        languages={
            "de": ("Pfortader und Milzvene", "Milzvene und Pfortader", "Pfortader", "Milzvene"),
            "fr": (
                "veine porte et veine splénique", "veines porte et splénique", "veine porte et splénique",
                "veine porte", "veine splénique",
            ),
            "es": (
                "vena porta y vena esplénica", "venas porta y esplénica", "vena porta y esplénica", "vena porta",
                "vena esplénica",
            ),
            "it": (
                "vena porta e vena splenica", "vene porta e splenica", "vena porta e splenica", "vena splenica",
                "vena lienale",
            ),
            "zh": ("门静脉和脾静脉", "门静脉与脾静脉", "门静脉", "脾静脉", "門靜脈", "脾靜脈"),
        },
    ),
    Structure(
        "pancreas", 11, "#b6e36b", Code("15776009", "Pancreas"), "pancreas",
        training=("pancreatic parenchyma", "pancreatic gland", "whole pancreas"),
        heldout=("pancreatic tissue", "pancreas gland", "pancreatic organ"),
        parsing=("pancreatic", "pancreas parenchyma"),
        languages={
            "de": ("Bauchspeicheldrüse", "Bauchspeicheldruese", "Pankreas"), "fr": ("pancréas",), "es": ("páncreas",),
            "it": ("pancreas",), "zh": ("胰", "胰腺", "胰脏", "胰臟"),
        },
    ),
    Structure(
        "right adrenal gland", 12, "#ff9f1c", _ADRENAL, "adrenal_gland_right", "right", _ADRENAL_NOUNS,
        _ADRENAL_TRAINING, _ADRENAL_HELDOUT,
        languages={
            "de": ("rechte Nebenniere",), "fr": ("surrénale droite",), "es": ("glándula suprarrenal derecha",),
            "it": ("surrene destro",), "zh": ("右肾上腺", "右侧肾上腺", "右腎上腺"),
        },
    ),
    Structure(
        "left adrenal gland", 13, "#fff1a8", _ADRENAL, "adrenal_gland_left", "left", _ADRENAL_NOUNS,
        _ADRENAL_TRAINING, _ADRENAL_HELDOUT,
        languages={
            "de": ("linke Nebenniere",), "fr": ("surrénale gauche",), "es": ("glándula suprarrenal izquierda",),
            "it": ("surrene sinistro",), "zh": ("左肾上腺", "左侧肾上腺", "左腎上腺"),
        },
    ),
)  # fmt: skip
"""The 13 structures of BTCV, ascending by label id."""

STRUCTURES: tuple[str, ...] = tuple(row.name for row in TABLE)
"""Their names, in the order of their label ids."""

LAST_LABEL_ID = max(row.label_id for row in TABLE)
"""Structures that the table does not know are numbered after it."""

OTHER_COLORS = ("#e0aaff", "#80ed99", "#ff8fa3", "#a0c4ff", "#ffd6a5", "#caffbf")
"""Of structures that the table does not know, in turn."""

COLORS: Mapping[str, str] = {row.name: row.color for row in TABLE}
"""Structure -> "#rrggbb"."""

_ROWS = {row.name: row for row in TABLE}


def find_structure(name: str) -> Structure | None:
    """The row of a structure, by its own name; None if the table has none.

    Example:
        >>> find_structure("left kidney").laterality.meaning
        'Left'
    """
    return _ROWS.get(name)


def fixed_ids() -> dict[str, int]:
    """Structure -> the id that every answer of this program uses.

    Example:
        >>> fixed_ids()["liver"]
        6
    """
    return {row.name: row.label_id for row in TABLE}


def number_structures(names: Iterable[str], own: Mapping[str, int] | None = None) -> dict[str, int]:
    """Label ids of some structures: their fixed ones; those that the table does not know follow in their order.

    Args:
        own: Ids beyond the table's of structures that it does not know.

    Example:
        >>> number_structures(["liver", "tumour", "spleen"])
        {'liver': 6, 'tumour': 14, 'spleen': 1}
    """
    ids: dict[str, int] = {}
    others = max([LAST_LABEL_ID, *(own or {}).values()])
    for name in names:
        if name in _ROWS:
            ids[name] = _ROWS[name].label_id
        elif own is not None and name in own:
            ids[name] = own[name]
        elif name not in ids:
            others += 1
            ids[name] = others
    return ids


def name_label_id(label_id: int) -> str | None:
    """The structure with this fixed id; None if there is none.

    Example:
        >>> name_label_id(6), name_label_id(99)
        ('liver', None)
    """
    return next((row.name for row in TABLE if row.label_id == label_id), None)


def pick_color(structure: str, label_id: int = 1) -> str:
    """Colour of a structure as "#rrggbb": its own, else one of `OTHER_COLORS` by its label id (from 1).

    Example:
        >>> pick_color("aorta"), pick_color("tumour", 14)
        ('#ff3b3b', '#80ed99')
    """
    row = _ROWS.get(structure)
    return row.color if row is not None else OTHER_COLORS[(label_id - 1) % len(OTHER_COLORS)]


def find_coded(value: str, modifier: str = "") -> tuple[str, ...]:
    """The structures that a code of a DICOM or 3D Slicer segmentation can mean: both of a pair if it gives no side.

    Args:
        value: SNOMED CT code of the segment's type.
        modifier: Of its modifier; "" for none.

    Example:
        >>> find_coded("64033007", "7771000"), find_coded("64033007"), find_coded("85756007")
        (('left kidney',), ('right kidney', 'left kidney'), ())
    """
    found = [row for row in TABLE if (row.has_own_code and row.code.value == value) or _ALSO.get(value) == row.name]
    sided = [row for row in found if row.laterality is not None and row.laterality.value == modifier]
    return tuple(row.name for row in sided or found)


def list_codes() -> tuple[str, ...]:
    """Every SNOMED CT value that `find_coded` understands, of structures and of sides.

    Example:
        >>> "10200004" in list_codes(), LEFT.value in list_codes()
        (True, True)
    """
    return (*dict.fromkeys([*(row.code.value for row in TABLE), *_ALSO, RIGHT.value, LEFT.value]),)


_ALSO = {
    "9846003": "right kidney",
    "18639004": "left kidney",
    "32764006": "portal and splenic veins",
    "35819009": "portal and splenic veins",
}
"""Codes that are read as a structure, because they mean it or a part of it, and not written."""
