"""A TextDiff model: frozen features, frozen sentence encoder, trained head, and the card that ties them together.

::

    <version folder>/
      card.json          what it is; read without loading a weight
      head.safetensors   the trained part, fp16
      run.json           what made it
      README.md          the model card for people

The denoiser lies beside it (``../../denoiser`` of the shipped one) or is a hub id; card.json names it and vouches for
its content.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from scipy import ndimage
from torch import Tensor

from progidiff.errors import CancelledError, ModelError, RequestError, StoreError
from progidiff.images.pictures import PICTURE
from progidiff.model.backbone import pick_device
from progidiff.model.folder import check_tensors
from progidiff.model.hub_card import HubFacts, write_front_matter
from progidiff.proposals.agreement import compute_disagreement
from progidiff.storage.app_folder import find_model
from progidiff.storage.atomic import atomic_folder
from progidiff.storage.versions import to_json
from progidiff.textdiff.features import DiffusionFeatures, FeatureExtractor, FeatureOptions
from progidiff.textdiff.network import HeadConfig, TextDiffHead
from progidiff.textdiff.phrases import Phrase
from progidiff.textdiff.pictures import Picture, compute_blend, list_tiles, pad, resize, to_picture, to_working
from progidiff.textdiff.sentences import SentenceEncoder, mirror_sentence
from progidiff.textdiff.weights import read_json
from progidiff.training.loop import find_autocast_dtype
from progidiff.training.settings import to_values

logger = logging.getLogger(__name__)

FORMAT = 1
CARD_FILE, WEIGHTS_FILE = "card.json", "head.safetensors"
TILE, OVERLAP = 512, 32
"""Working pixels: the longest side of a tile, and what neighbours share. Training cuts its pictures in the same way."""

MAX_DRAWS = 64


@dataclass(frozen=True)
class TextDiffCard:
    """``card.json``: what a model is, without its weights.

    Attributes:
        name, version: Shown as ``name@version``; version 0 was not yet given a number.
        classes: Foreground classes by name, label value 1 upwards.
        denoiser: Folder relative to the version's folder, or hub id.
        denoiser_digest: Content of the denoiser.
        encoder: Folder or hub id of the sentence encoder; "" for the offline default.
        encoder_digest: Content of it; "" for a head without the text branch.
        features: Which activations.
        head: Shapes of the head.
        threshold: Foreground probability above which a pixel is drawn.
        gray: It was trained on gray pictures.
        data: What it was trained on, by name.
        licence: Of the weights.
        figures: name -> number, measured on held-out images.
        created: ISO time, UTC.
        sha256: Of head.safetensors.
        phrases: What it was taught to read, if the sentence selects which classes are drawn; empty if all always are.
        one_piece: Each class is one connected thing: only its largest piece is drawn.
    """

    name: str
    version: int
    classes: tuple[str, ...]
    denoiser: str
    denoiser_digest: str
    encoder: str
    encoder_digest: str
    features: FeatureOptions
    head: HeadConfig
    threshold: float = 0.5
    gray: bool = False
    data: str = ""
    licence: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    created: str = ""
    sha256: str = ""
    phrases: tuple[Phrase, ...] = ()
    one_piece: bool = False

    @property
    def full_name(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def kind(self) -> str:
        """See `VersionCard`."""
        return "head"

    @property
    def modality(self) -> str:
        """See `VersionCard`."""
        return PICTURE

    @property
    def structures(self) -> tuple[str, ...]:
        """See `VersionCard`."""
        return self.classes

    @property
    def base(self) -> str:
        """See `VersionCard`."""
        return self.denoiser_digest

    @property
    def base_name(self) -> str:
        """See `VersionCard`."""
        return self.denoiser

    def to_dict(self) -> dict[str, Any]:
        """Plain values for card.json."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"classes": list(self.classes), "features": to_values(self.features), "head": self.head.to_dict()}
        values["phrases"] = [[phrase.text, list(phrase.classes)] for phrase in self.phrases]
        for name in ("phrases", "one_piece"):  # Cards without them stay as programs before them read and wrote them.
            if not values[name]:
                del values[name]
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextDiffCard:
        """The inverse of `to_dict`.

        Raises:
            ModelError: if it has another format.
        """
        if values["format"] != FORMAT:
            raise ModelError(
                f"This model has format {values['format']}, this program reads {FORMAT}; "
                "install the version that wrote it."
            )
        plain = {f.name: values[f.name] for f in fields(cls) if f.name not in ("phrases", "one_piece")}
        asked = plain["features"]
        listed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items()}
        features = FeatureOptions(**listed)
        head = HeadConfig.from_dict(plain["head"])
        return cls(
            **{
                **plain,
                "version": int(plain["version"]),
                "classes": tuple(plain["classes"]),
                "features": features,
                "head": head,
                "phrases": tuple(Phrase(str(text), tuple(asks)) for text, asks in values.get("phrases", ())),
                "one_piece": bool(values.get("one_piece", False)),
            }
        )


@dataclass(frozen=True)
class TextDiffResult:
    """What a picture and a sentence gave.

    Attributes:
        probabilities: (classes, H, W) float32 at the picture's own size, mean over the draws; 0..1, not calibrated.
        mask: (H, W) uint8: 0, or the number of the class (1 upwards).
        masks: (K, H, W) uint8, one per draw.
        disagreement: 1 - mean pairwise Dice of the draws' foregrounds; 0 for one draw.
        disagreement_map: (H, W) float32, standard deviation of the foreground probability over the draws times two:
            0..1.
        notes: What the user should know (no sentence, alpha blended, padded ...), one sentence each.
        sentence: What was read; None if there was none.
        seconds: Time it took.
    """

    probabilities: NDArray[Any]
    mask: NDArray[Any]
    masks: NDArray[Any]
    disagreement: float
    disagreement_map: NDArray[Any]
    notes: tuple[str, ...]
    sentence: str | None
    seconds: float


class TextDiffModel:
    """Everything that answers a picture and a sentence. One prediction at a time; the caller locks the device.

    Args:
        extractor: Frozen features.
        encoder: None for a head without the text branch.
        head: The trained part.
        card: What it is.
        folder: Where it was loaded from; None if it was not saved yet.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        encoder: SentenceEncoder | None,
        head: TextDiffHead,
        card: TextDiffCard,
        folder: Path | None = None,
    ) -> None:
        self.extractor, self.encoder, self.head, self.card, self.folder = extractor, encoder, head, card, folder

    def predict(
        self,
        picture: Picture | NDArray[Any] | Tensor,
        sentence: str | None = None,
        draws: int | None = None,
        *,
        attend: bool = True,
        tile: int = 512,
        overlap: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> TextDiffResult:
        """Segment a picture of any size.

        Args:
            picture: From `read_picture`, or (H, W), (H, W, 1 to 4) or (3, H, W) values, see `to_picture`.
            sentence: What a report says of it; None or blank for none.
            draws: K noises to average over and compare; None for the card's.
            attend: False leaves the text's contribution out.
            tile: Longest side of a tile in working pixels; larger pictures are cut.
            overlap: Working pixels that neighbouring tiles share, blended.
            on_progress: (tiles done, tiles in all), over all draws.
            is_cancelled: Asked before every tile.

        Raises:
            ImageError: if the picture cannot be used.
            RequestError: if the sentence is longer than the encoder takes, or `draws` is not 1 to 64.
            CancelledError: if `is_cancelled` said so.
        """
        started = time.monotonic()
        draws = self.card.features.draws if draws is None else draws
        if not 1 <= draws <= MAX_DRAWS:
            raise RequestError(
                f"draws must lie in 1..{MAX_DRAWS}, got {draws}; 1 is fast, 4 to 8 show where the answer is unsure."
            )
        if overlap < 0 or tile <= 2 * overlap:
            raise RequestError(f"tile must be larger than twice the overlap ({overlap}), got {tile}.")
        picture = _as_picture(picture)
        sentence = (sentence or "").strip() or None
        notes = [*picture.notes, *find_notes(self.card, picture, sentence, attend)]
        options = self.card.features
        if self.encoder is not None and sentence is not None:
            self.encoder.check([sentence])
        working = to_working(picture.pixels, options.scale, options.size, options.tone)
        height, width = int(working.shape[1]), int(working.shape[2])
        tiles = list_tiles(height, width, tile, overlap)
        total = draws * len(tiles)
        found = np.empty((draws, len(self.card.classes), *picture.size), np.float32)
        for draw in range(draws):
            axes = pick_mirror(draw) if options.mirror else []
            shown = working.flip(axes)
            tokens = mask = None
            if self.encoder is not None and sentence is not None and attend:
                tokens, mask = self.encoder.encode([mirror_sentence(sentence, -1 in axes, -2 in axes)])
            sums, weights = torch.zeros(len(self.card.classes), height, width), torch.zeros(height, width)
            for done, box in enumerate(tiles, start=draw * len(tiles)):
                if is_cancelled is not None and is_cancelled():
                    raise CancelledError(f"The segmentation was stopped on request after {done} of {total} tiles.")
                blend = compute_blend(box, height, width, overlap)
                answer = self._answer(box.crop(shown), box.place(height, width), tokens, mask, draw, attend)
                box.crop(sums).add_(answer * blend)
                box.crop(weights).add_(blend)
                if on_progress is not None:
                    on_progress(done + 1, total)
            found[draw] = resize((sums / weights).flip(axes)[None], picture.size)[0].clamp(0, 1).numpy()
        masks = np.stack([self.draw_mask(probabilities) for probabilities in found])
        notes += find_silence(self.card, sentence if attend else None, bool(masks.any()))
        mean = found.mean(axis=0)
        spread = np.minimum(1, 2 * found.sum(axis=1).std(axis=0)).astype(np.float32)
        return TextDiffResult(
            probabilities=mean,
            mask=self.draw_mask(mean),
            masks=masks,
            disagreement=compute_disagreement(torch.from_numpy(masks > 0)) if draws > 1 else 0.0,
            disagreement_map=spread,
            notes=tuple(notes),
            sentence=sentence,
            seconds=time.monotonic() - started,
        )

    def draw_mask(self, probabilities: NDArray[Any]) -> NDArray[Any]:
        """Class numbers where the foreground is likelier than the card's threshold.

        Args:
            probabilities: (classes, H, W).

        Returns:
            (H, W) uint8, 0 for background.
        """
        foreground = probabilities.sum(axis=0) > self.card.threshold
        mask = np.where(foreground, probabilities.argmax(axis=0) + 1, 0).astype(np.uint8)
        return keep_largest_pieces(mask) if self.card.one_piece else mask

    @torch.no_grad()
    def _answer(
        self,
        working: Tensor,
        place: tuple[float, float, float, float],
        tokens: Tensor | None,
        mask: Tensor | None,
        draw: int,
        attend: bool,
    ) -> Tensor:
        """(classes, h, w) foreground probabilities of a tile."""
        device = next(self.head.parameters()).device
        dtype = find_autocast_dtype("auto", device)
        features = self.extractor(pad(working, max(self.extractor.strides))[None], draw)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = self.head(
                [f.to(device) for f in features], tokens, mask, torch.tensor([place], device=device), attend
            )
        found: Tensor = logits[0].softmax(dim=0)[1:, : working.shape[1], : working.shape[2]].float().cpu()
        return found

    def pack_weights(self) -> bytes:
        """The head as a safetensors file, fp16; statistics of the features stay fp32."""
        tensors = {n: t.detach().cpu() for n, t in self.head.state_dict().items()}
        found: bytes = save_safetensors(
            {n: (t if n.startswith(("mean_", "std_")) else t.half()).contiguous() for n, t in tensors.items()}
        )
        return found

    def save(self, folder: Path, run: Mapping[str, Any], readme: str | None = None) -> TextDiffModel:
        """Write a version folder by one rename; it must not exist. Returns the model as it lies there.

        Args:
            folder: To be made.
            run: What made it.
            readme: The model card; None to write one from what is known.

        Raises:
            RequestError: if the folder exists.
            StoreError: if the disk refuses; nothing is left behind then.
        """
        folder = Path(folder)
        if folder.exists():
            raise RequestError(f"'{folder}' exists; give a folder that does not, nothing is overwritten.")
        content = self.pack_weights()
        card = replace(
            self.card,
            denoiser=refer_to(self.card.denoiser, self.folder, folder),
            created=self.card.created or datetime.now(UTC).isoformat(timespec="seconds"),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as scratch:
                (scratch / WEIGHTS_FILE).write_bytes(content)
                (scratch / "run.json").write_bytes(to_json(run))
                (scratch / "README.md").write_text(readme or write_model_card(card, run), encoding="utf-8")
                (scratch / CARD_FILE).write_bytes(to_json(card.to_dict()))
        except OSError as err:
            raise StoreError(
                f"The model could not be written to '{folder}' ({err}). Free some disk "
                "space or check who may write there."
            ) from err
        return TextDiffModel(self.extractor, self.encoder, self.head, card, folder)


def find_notes(card: TextDiffCard, picture: Picture, sentence: str | None, attend: bool = True) -> list[str]:
    """What the user should know about a picture and a sentence that a model answers, beside `Picture.notes`; no weights
    are needed.
    """
    notes = []
    if picture.gray and not card.gray:
        notes.append(f"The picture is gray, '{card.full_name}' learned from colour pictures: expect a worse answer.")
    if card.gray and not picture.gray and bool((picture.pixels != picture.pixels[:1]).any()):
        notes.append(f"The picture is coloured, '{card.full_name}' learned from gray pictures: expect a worse answer.")
    reads = bool(card.head.text_features)
    if not reads and sentence is not None:
        notes.append(f"'{card.full_name}' was trained without sentences; this one was not read.")
    elif card.phrases and sentence is None and attend:
        notes.append(
            f"There is no sentence, and '{card.full_name}' draws what a sentence asks for, so it draws nothing; write "
            f"one, for example '{card.phrases[0].text}'."
        )
    elif reads and sentence is None and attend:
        notes.append("There is no sentence for this picture; it was segmented without one.")
    return notes


def find_silence(card: TextDiffCard, sentence: str | None, drawn: bool) -> list[str]:
    """What the user should know if a sentence drew nothing though it decides what is drawn.

    Args:
        card: Of the model that answered.
        sentence: What it read; None for none, which `find_notes` speaks about.
        drawn: Whether any draw marks a pixel.
    """
    if drawn or not card.phrases or sentence is None:
        return []
    return [
        f"Nothing is drawn: '{card.full_name}' found nothing in the sentence that it knows "
        f"({', '.join(card.classes)}), or it is not in this picture. Ask for it by name, for "
        f"example '{card.phrases[0].text}'."
    ]


def keep_largest_pieces(mask: NDArray[Any]) -> NDArray[Any]:
    """Class numbers (H, W) with the largest connected piece of each class, the first of equal ones.

    Example:
        >>> keep_largest_pieces(np.array([[1, 0, 1, 1, 2]], np.uint8)).tolist()
        [[0, 0, 1, 1, 2]]
    """
    found = mask.copy()
    for value in np.unique(mask[mask > 0]):
        pieces, count = ndimage.label(mask == value)
        if count > 1:
            largest = np.bincount(pieces.ravel())[1:].argmax() + 1
            found[(pieces > 0) & (pieces != largest)] = 0
    return found


def pick_mirror(number: int) -> list[int]:
    """The axes of a (..., H, W) tensor that a draw or view mirrors: none, W, H, both, and so on.

    Example:
        >>> [pick_mirror(number) for number in range(5)]
        [[], [-1], [-2], [-1, -2], []]
    """
    return [axis for axis, bit in ((-1, 1), (-2, 2)) if number & bit]


def default_folder() -> Path:
    """``textdiff`` in the model that comes with the app: ``denoiser/`` and the shipped ``nuclei/``."""
    return find_model() / "textdiff"


def load_textdiff(
    folder: str | Path | None = None, device: str | None = None, denoiser: str | Path | None = None
) -> TextDiffModel:
    """Load a model.

    Args:
        folder: A version's folder (it has card.json), or a folder of versions with a CURRENT pointer, whose served
            version is taken; None for the shipped one.
        device: "cpu", "cuda"; None to pick.
        denoiser: Where the denoiser lies now, if not where the card says; its content must be the same.

    Raises:
        ModelError: if anything is missing, damaged or does not fit together.
    """
    place = find_version(folder)
    card = load_textdiff_card(place)
    path = place / WEIGHTS_FILE
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ModelError(f"'{path}' cannot be read ({err}); restore the folder from the version it came with.") from err
    if hashlib.sha256(content).hexdigest() != card.sha256:
        raise ModelError(
            f"'{path}' is damaged: its content is not the one that {CARD_FILE} vouches for. Restore the folder."
        )
    source = _find_denoiser(card, place) if denoiser is None else denoiser
    extractor = DiffusionFeatures.load(source, card.features, device)
    if extractor.digest != card.denoiser_digest:
        raise ModelError(
            f"Model '{card.full_name}' was trained with another denoiser (content "
            f"{card.denoiser_digest[:12]}) than '{source}' (content {extractor.digest[:12]}). Name the folder of its "
            "own with --denoiser, or train one for this denoiser."
        )
    encoder = None
    if card.head.text_features:
        encoder = SentenceEncoder.load(card.encoder, device)
        if encoder.digest != card.encoder_digest:
            raise ModelError(
                f"Model '{card.full_name}' was trained with another sentence encoder "
                f"(content {card.encoder_digest[:12]}) than '{card.encoder or 'the offline default'}' is now (content "
                f"{encoder.digest[:12]}). Install the version that run.json names."
            )
    if extractor.channels != card.head.channels or extractor.strides != card.head.strides:
        raise ModelError(
            f"The card of '{card.full_name}' contradicts itself: its features do not fit its head. Restore '{place}'."
        )
    head = TextDiffHead(card.head)
    tensors = load_safetensors(content)
    check_tensors(tensors, head.state_dict(), path)
    head.load_state_dict({n: t.float() for n, t in tensors.items()})
    head.to(pick_device(device), memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    return TextDiffModel(extractor, encoder, head, card, place)


def load_textdiff_card(folder: str | Path) -> TextDiffCard:
    """Read card.json of a version's folder, or of the served version of a folder of versions.

    Raises:
        ModelError: if it is missing or cannot be read.
    """
    place = find_version(folder)
    try:
        return TextDiffCard.from_dict(read_json(place / CARD_FILE))
    except (KeyError, TypeError, ValueError) as err:
        raise ModelError(
            f"'{place / CARD_FILE}' cannot be read ({type(err).__name__}: {err}); restore "
            "it from the version it came with."
        ) from err


def find_version(folder: str | Path | None) -> Path:
    """The folder that holds card.json: `folder` itself, or the version in it that CURRENT names; None for the shipped
    model.

    Raises:
        ModelError: if there is none.
    """
    place = default_folder() / "nuclei" if folder is None else Path(folder)
    if (place / CARD_FILE).is_file():
        return place
    if not (place / "CURRENT").is_file():
        raise ModelError(f"'{place}' holds no model ({CARD_FILE} is missing); `progidiff textdiff train` makes one.")
    version = read_json(place / "CURRENT").get("version")
    if not isinstance(version, int) or not (place / str(version) / CARD_FILE).is_file():
        raise ModelError(
            f"'{place}' serves no version that is there (CURRENT names {version}); name a version's folder."
        )
    return place / str(version)


def refer_to(denoiser: str, before: Path | None, now: Path) -> str:
    """How a card in `now` names a denoiser.

    Args:
        denoiser: Hub id, or folder: absolute, or relative to `before`.
        before: Where the card that says so lay; None if nowhere yet.
        now: Where it will lie.

    Returns:
        A hub id as it is; a folder relative to `now`, with forward slashes, so that both can be moved together.
    """
    path = Path(denoiser) if before is None else before / denoiser
    if not denoiser or not path.is_dir():
        return denoiser
    # Links are followed on both sides: ".." means what the system makes of it.
    return Path(os.path.relpath(path.resolve(), now.parent.resolve() / now.name)).as_posix()


def write_model_card(card: TextDiffCard, run: Mapping[str, Any]) -> str:
    """A model card in Markdown from what is known; people add limits and pictures."""
    figures = "\n".join(f"| {name} | {value:.3f} |" for name, value in card.figures.items())
    is_hub_id = card.denoiser.count("/") == 1 and not card.denoiser.startswith((".", "/"))
    facts = HubFacts(
        name=card.full_name,
        library="progidiff",
        tags=("medical", *card.classes),
        licence=card.licence.partition(":")[0],
        base_model=card.denoiser if is_hub_id else "",
        datasets=[card.data.partition(" (")[0]] if card.data else (),
        measured_on="Held-out pictures",
        dice={"": card.figures["dice"]} if "dice" in card.figures else {},
    )
    return f"""{write_front_matter(facts)}# {card.full_name}

Segments {", ".join(card.classes)} in 2-D pictures{
        " with a report sentence" if card.head.text_features else ""
    }: a small head
on the frozen features of a diffusion model.

* Trained on {len(run.get("training_cases", []))} labelled pictures: {
        ", ".join(run.get("training_cases", [])) or "not said"
    }. {card.data}
* Held out: {", ".join(run.get("held_out_cases", [])) or "none"}.
* Licence of these weights: {
        card.licence or "that of the data they learned from. Write its name and terms here before you pass them on."
    }
* Denoiser: content {card.denoiser_digest[:12]}; sentence encoder: {
        card.encoder or "all-MiniLM-L6-v2" if card.head.text_features else "none"
    }.

| on the held-out pictures | |
|---|---|
{figures}

A probability here is not calibrated. For research only: nothing here may guide a diagnosis.
"""


def _find_denoiser(card: TextDiffCard, place: Path) -> str | Path:
    """Where the denoiser of a card lies: as it says, or the shipped one if the folder was moved and the content is said
    to be the same.
    """
    beside = place.resolve() / card.denoiser
    if beside.is_dir():
        return beside
    if card.denoiser.startswith((".", "/")):
        raise ModelError(
            f"The denoiser of '{card.full_name}' is not at '{card.denoiser}' beside "
            f"'{place}'. Move both together, or name its folder with --denoiser."
        )
    return card.denoiser


def _as_picture(picture: Picture | NDArray[Any] | Tensor) -> Picture:
    if isinstance(picture, Picture):
        return picture
    array = picture.numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] not in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    return to_picture(array)
