"""What the review page asks about a picture beside its slice and its masks: its colours, its sentence and who changed
it, the TextDiff models that can be asked; and the sentence that goes back into ``text.csv``.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from progidiff.errors import ModelError, RequestError
from progidiff.images.formats import is_picture
from progidiff.server.datastores.images import find_image
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import ANNOTATE, CALLER, MEDIUM, READ, Content, Endpoints
from progidiff.server.parts import Context, get_context
from progidiff.server.routes.image_id import ImageId
from progidiff.server.tasks.pictures import open_picture
from progidiff.server.tasks.sentences import SentenceChange
from progidiff.storage.json_text import Text

_MOST_WORDS = 200
_MOST_CHANGES = 20


class SentenceAnswer(BaseModel):
    """The sentence of a picture.

    Attributes:
        sentence: In text.csv; "" for none.
        problem: Why the table cannot be read, with the cure; "" if it can. A sentence can then be asked
            with, and not be saved.
        most_letters: Longest sentence that is saved.
        changes: The last ones of this picture, newest first.
    """

    model_config = ConfigDict(frozen=True)

    sentence: Text
    problem: Text
    most_letters: int
    changes: list[SentenceChange]


class HeadAnswer(BaseModel):
    """A TextDiff model that is served.

    Attributes:
        name: To ask for it by.
        version: ``name@version`` that answers.
        classes: What it draws.
        reads_text: Whether the sentence reaches it.
        gray: Whether it learned from grey pictures.
        phrases: Sentences that it was taught to tell apart; empty for a model that takes free sentences.
        figures: Measured on held-out pictures, 0 to 1.
    """

    model_config = ConfigDict(frozen=True)

    name: Text
    version: Text
    classes: list[Text]
    reads_text: bool
    gray: bool
    phrases: list[Text]
    figures: dict[Text, float]


class ReviewedPicture(BaseModel):
    """What the review page needs to know of a picture.

    Attributes:
        image: Its id.
        width, height: Pixels, as it is shown.
        is_coloured: Whether there are colours to show.
        notes: What was done to read it, one sentence each.
        sentence: Of it.
        head: Name of the model that is asked if nobody chooses; "" if there is none.
        heads: All that are served, the newest first.
        problem: Why none can be asked; "" if one can.
    """

    model_config = ConfigDict(frozen=True)

    image: str
    width: int
    height: int
    is_coloured: bool
    notes: list[Text]
    sentence: SentenceAnswer
    head: Text
    heads: list[HeadAnswer]
    problem: Text


class SentenceRequest(BaseModel):
    """Another sentence for a picture.

    Attributes:
        sentence: The new one; null to take it away.
        former: The one that the person saw; "" for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sentence: str | None
    former: str


def build_endpoints() -> Endpoints:
    """A picture, its pixels, its sentence."""
    endpoints = Endpoints()

    @endpoints.get(
        "/progidiff/pictures/{image}",
        READ,
        tags=["Review"],
        summary="A picture's size, sentence with its changes, and the models to ask",
    )
    def describe(image: ImageId) -> ReviewedPicture:
        return describe_picture(get_context(), image)

    @endpoints.get(
        "/progidiff/pictures/{image}/pixels", READ, tags=["Review"], summary="The picture as the model sees it, PNG"
    )
    def get_pixels(request: Request, image: ImageId) -> Response:
        context = get_context()
        png = context.textdiff.open_view(find_picture(context, image)).png
        return Response(png, media_type="image/png", headers={"Cache-Control": "no-store"})

    @endpoints.put(
        "/progidiff/pictures/{image}/sentence",
        ANNOTATE,
        tags=["Review"],
        summary="Write a picture's sentence into text.csv",
        takes="JSON: sentence (null takes it away), former (the one that was seen)",
        body=MEDIUM,
        content=Content.JSON,
    )
    def change_sentence(image: ImageId, asked: SentenceRequest, user: User = CALLER) -> SentenceAnswer:
        context = get_context()
        path = find_picture(context, image)
        context.sentences.change(image, path.name, asked.sentence, asked.former, user.name)
        context.scorer.wake()  # Its proposals depend on it.
        return _describe_sentence(context, image, path)

    return endpoints


def find_picture(context: Context, image: str) -> Path:
    """The file of a picture.

    Raises:
        NotFoundError: if there is no such image.
        RequestError: if it is a volume.
    """
    path = Path(find_image(context.app, image))
    if not is_picture(path):
        raise RequestError(f"'{image}' is a volume, not a picture. Open it as one: GET /progidiff/review/{image}.")
    return path


def describe_picture(context: Context, image: str) -> ReviewedPicture:
    """All that the page wants to know at once.

    Raises:
        NotFoundError, RequestError: as `find_picture`.
        ImageError: if the picture cannot be read.
    """
    path = find_picture(context, image)
    view = context.textdiff.open_view(path)
    height, width = view.pixels.shape[:2]
    heads = context.textdiff.engine.list_served()
    head, problem = "", ""
    try:
        head = context.textdiff.pick_fitting(open_picture(path)).name
    except ModelError as err:
        problem = str(err)
    return ReviewedPicture(
        image=image,
        width=width,
        height=height,
        is_coloured=view.is_coloured,
        notes=list(view.notes),
        sentence=_describe_sentence(context, image, path),
        head=head,
        heads=[
            HeadAnswer(
                name=card.name,
                version=card.full_name,
                classes=list(card.classes),
                reads_text=bool(card.head.text_features),
                gray=card.gray,
                phrases=[phrase.text for phrase in card.phrases][:_MOST_WORDS],
                figures=card.figures,
            )
            for card in heads
        ],
        problem=problem,
    )


def _describe_sentence(context: Context, image: str, path: Path) -> SentenceAnswer:
    from progidiff.textdiff.sentence_table import MAX_LETTERS

    sentence, problem = "", ""
    try:
        sentence = context.textdiff.sentences.find(path.name) or ""
    except RequestError as err:
        problem = str(err)
    if not context.sentences.is_possible:
        problem = "The images lie in no folder, so no sentence can be kept beside them."
    return SentenceAnswer(
        sentence=" ".join(sentence.split()),
        problem=problem,
        most_letters=MAX_LETTERS,
        changes=context.sentences.find_changes(image)[:_MOST_CHANGES],
    )
