"""Log lines: as text or as JSON, with the request that they belong to, and without names of patients.

Images are named by people, often after the patient, and so are files, folders and prompts. In the log of a server that
hides names each of them is a pseudonym, ``#`` and 12 hexadecimal digits: the same for the same image in every line and
after a restart (a keyed hash), and of no use to whoever has the log alone. What is hidden in a line:

* whatever stands in quotes, as every name does in the messages of this program, unless it is a word of the program;
* every image id that is served, quoted or not, in messages of other packages too;
* what the client of the request has typed into its address, and the names of its files;
* what looks like a person's name or a unique identifier in DICOM (``DOE^JANE``, ``1.2.826.0.1...``).

Names of accounts and addresses of clients stay: who did what is what such a log is for. They are fields of their own.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from progidiff.storage.state_files import load_state
from progidiff.users import write_private

logger = logging.getLogger(__name__)

TEXT, JSON = "text", "json"
"""Choices of `--conf log`."""

HASHED, PLAIN = "hashed", "plain"
"""Choices of `--conf log_names`."""

ENVIRONMENT = "PROGIDIFF_LOG"
"""How a process of the server is told how to write its lines, see `describe_for_child`."""

_KEY_BYTES = 32
_DIGITS = 12
_PSEUDONYM = re.compile(rf"#[0-9a-f]{{{_DIGITS}}}")

# A quote opens behind what is no letter and closes before what is none: "the server's" opens none.
_QUOTED = re.compile(r"""(?<!\w)(['"`])(?=\S)(.{1,1000}?)\1(?!\w)""")
_PERSON = re.compile(r"[^\s'\"=:,()\[\]{}]*\^[^\s'\",()\[\]{}]*")
_UID = re.compile(r"(?<![\w.])(?!1\.2\.840\.10008\.)\d+(?:\.\d+){5,}(?![\w.])")
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"[-+]?\d{1,4}([.,:x]\d{1,4})*")

PROGRAM_WORDS = frozenset(
    {
        *(
            ".progidiff",
            "labels",
            "final",
            "original",
            "annotations",
            "torn",
            "sessions",
            "scores",
            "dicom",
            "training",
        ),
        *("runs", "work", "adapters", "textdiff", "backbone", "conditioning", "model", "log.jsonl", "head.json"),
        *(
            "labels.json",
            "structures.json",
            "datastore_v2.json",
            "reservations.json",
            "retrain.json",
            "request.json",
            "progress.json",
        ),
        *("outcome.json", "log.txt", "lock", "session.key", "ended.json", "local-token", "log.key", "entry.json"),
        *("all", "json", "image", "true", "false", "random", "consensus", "best", "auto", "none", "progidiff"),
    }
)
"""Names of files and folders that this program makes, and values that its requests have: they are nobody's."""

_MIN_NAME, _MIN_NUMBER = 3, 5
"""Characters of a name, and digits of a number, that is looked for outside of quotes."""


@dataclass
class RequestNote:
    """The request that a line belongs to.

    Attributes:
        id: Its id, as its answer says it.
        account: Who sent it; "" if nobody had to log in.
        texts: What its client typed, which may be a name.
    """

    id: str
    account: str = ""
    texts: set[str] = field(default_factory=set)


_request: ContextVar[RequestNote | None] = ContextVar("progidiff_request", default=None)


def begin_request(note: RequestNote) -> None:
    """From now on lines of this task, and of the threads it is carried into, belong to this request."""
    _request.set(note)


def find_request() -> RequestNote | None:
    """The request that is being answered here; None outside of one."""
    return _request.get()


def note_account(name: str) -> None:
    """Say who sent the request that is being answered here."""
    note = find_request()
    if note is not None:
        note.account = name


def note_texts(texts: Iterable[str]) -> None:
    """Say what the client of the request that is being answered here has typed."""
    note = find_request()
    if note is not None:
        note.texts.update(text for text in texts if len(text) >= _MIN_NAME)


class Names:
    """Puts pseudonyms in the place of names; safe for threads.

    Args:
        key: Of the hash; who has it can tell which pseudonym is whose.
        plain: Words that are no names: structures, options, folders of the program.
        roots: Folders that are told as they are; what lies in them is hidden part by part.
        strip: File name -> the id of the image, so that both have one pseudonym.

    Example:
        >>> names = Names(b"k" * 32, plain=("liver",), roots=("/data",))
        >>> names.watch(lambda: {"Doe_Jane": 1})
        >>> hidden = names.pseudonym("Doe_Jane")
        >>> names.hide("'/data/Doe_Jane' has no 'liver'.") == f"'/data/{hidden}' has no 'liver'."
        True
        >>> names.hide("GET image=Doe_Jane: 404") == f"GET image={hidden}: 404"
        True
    """

    def __init__(
        self,
        key: bytes,
        plain: Collection[str] = (),
        roots: Collection[str] = (),
        strip: Callable[[str], str] = str,
    ) -> None:
        self._key = key
        self._plain = set(plain)
        self._roots = sorted((root.rstrip("/") for root in roots if root.strip("/")), key=len, reverse=True)
        self._strip = strip
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._by_word: dict[str, list[tuple[str, str]]] = {}
        self._source: Callable[[], Collection[str]] = tuple
        self._seen: Collection[str] = ()

    def tell(self, words: Iterable[str]) -> None:
        """Take these for words of the program, too."""
        self._plain.update(words)

    def watch(self, source: Callable[[], Collection[str]]) -> None:
        """Hide these names wherever they stand.

        Args:
            source: The names; asked at every line, and looked through when it gives another object than before.
        """
        self._source = source

    def pseudonym(self, name: str) -> str:
        """What stands for a name."""
        stripped = self._strip(name.rpartition("/")[2] or name)
        digest = hmac.new(self._key, stripped.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
        return f"#{digest[:_DIGITS]}"

    def hide(self, text: str) -> str:
        """The text without names."""
        self._learn()
        text = _QUOTED.sub(lambda found: f"{found[1]}{self._hide_quoted(found[2])}{found[1]}", text)
        text = _PERSON.sub(lambda found: self.pseudonym(found[0]), text)
        text = _UID.sub(lambda found: self.pseudonym(found[0]), text)
        note = find_request()
        for typed in sorted(note.texts, key=len, reverse=True) if note is not None else ():
            if typed in text and typed not in self._plain:
                text = re.sub(rf"(?<!\w){re.escape(typed)}(?!\w)", lambda found: self.pseudonym(found[0]), text)
        return self._hide_known(text)

    def _hide_quoted(self, text: str) -> str:
        if text in self._plain or _NUMBER.fullmatch(text) or _PSEUDONYM.fullmatch(text):
            return text
        for root in self._roots:
            if text == root:
                return text
            if text.startswith(f"{root}/"):
                parts = text[len(root) + 1 :].split("/")
                return "/".join([root, *(part if self._is_told(part) else self.pseudonym(part) for part in parts)])
        return self.pseudonym(text)

    def _is_told(self, part: str) -> bool:
        return not part or part in self._plain or _NUMBER.fullmatch(part) is not None

    def _learn(self) -> None:
        names = self._source()
        if names is self._seen:
            return
        with self._lock:
            for name in names:
                if name not in self._known:
                    self._known.add(name)
                    self._add(name)
            self._seen = names

    def _add(self, name: str) -> None:
        """Find a name by its first word; a short one is nobody's outside of quotes, and would be found everywhere."""
        least = _MIN_NUMBER if name.isdigit() else _MIN_NAME
        for spelling in {name, quote(name)}:
            word = _WORD.search(spelling)
            if word is not None and len(name) >= least:
                same = self._by_word.setdefault(word[0], [])
                same.append((spelling, name))
                same.sort(key=lambda pair: len(pair[0]), reverse=True)

    def _hide_known(self, text: str) -> str:
        if not self._by_word:
            return text
        parts, done = [], 0
        for word in _WORD.finditer(text):
            for spelling, name in self._by_word.get(word[0], ()):
                begin = word.start() - spelling.index(word[0])
                end = begin + len(spelling)
                if begin >= done and text[begin:end] == spelling and not text[end : end + 1].isalnum():
                    parts += [text[done:begin], name if name in self._plain else self.pseudonym(name)]
                    done = end
                    break
        return "".join([*parts, text[done:]])


def format_exception(err: BaseException, hide: Callable[[str], str]) -> str:
    """A traceback whose messages are hidden; where in the code it happened is told."""
    pieces = traceback.TracebackException.from_exception(err).format()
    return "".join(piece if piece.startswith('  File "') else hide(piece) for piece in pieces).rstrip()


class JsonLines(logging.Formatter):
    """One JSON object per line.

    Args:
        hide: Takes names out of a text.
    """

    def __init__(self, hide: Callable[[str], str] = str) -> None:
        super().__init__()
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        note = find_request()
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": self._hide(record.getMessage()),
            "request": note.id if note is not None else _of_process(),
            "account": getattr(record, "account", note.account if note is not None else ""),
            "thread": record.threadName,
            "process": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = format_exception(record.exc_info[1], self._hide)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps({name: value for name, value in fields.items() if value not in ("", None)}, default=str)


class HiddenLines(logging.Formatter):
    """Lines as another formatter writes them, without names.

    Args:
        inner: The other one.
        hide: Takes names out of a text.
    """

    def __init__(self, inner: logging.Formatter, hide: Callable[[str], str]) -> None:
        super().__init__()
        self._inner = inner
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback below it."""
        shown = copy.copy(record)
        shown.msg, shown.args = self._hide(record.getMessage()), None
        if record.exc_info and record.exc_info[1] is not None:
            shown.exc_text, shown.exc_info = format_exception(record.exc_info[1], self._hide), None
        return self._inner.format(shown)


def _of_process() -> str:
    """The request that this process was started for."""
    return _told_by_parent.get("request", "")


_told_by_parent: dict[str, str] = {}
_told_to_children: dict[str, str] = {}


def configure(kind: str, names: Names | None) -> None:
    """Have every handler of this process write its lines so. Safe to call again.

    Args:
        kind: `TEXT` or `JSON`.
        names: Hides names; None to tell them.
    """
    hide: Callable[[str], str] = names.hide if names is not None else str
    for handler in _list_handlers():
        inner = handler.formatter or logging.Formatter()
        if isinstance(inner, HiddenLines):
            inner = inner._inner
        if kind == JSON:
            handler.setFormatter(JsonLines(hide))
        elif names is not None:
            handler.setFormatter(HiddenLines(inner, hide))
    if kind == JSON:
        logging.captureWarnings(True)
        threading.excepthook = _log_broken_thread


def _list_handlers() -> Iterator[logging.Handler]:
    named = [entry for entry in logging.root.manager.loggerDict.values() if isinstance(entry, logging.Logger)]
    seen: set[int] = set()
    for each in (logging.root, *named):
        for handler in each.handlers:
            if id(handler) not in seen:
                seen.add(id(handler))
                yield handler


def _log_broken_thread(args: threading.ExceptHookArgs) -> None:
    """In the place of Python's own, which writes a traceback that nobody has looked through."""
    if args.exc_type is SystemExit or args.exc_value is None:
        return
    name = args.thread.name if args.thread is not None else "unknown"
    info: tuple[type[BaseException], BaseException, TracebackType | None]
    info = (args.exc_type, args.exc_value, args.exc_traceback)
    logger.error("The thread %s broke", name, exc_info=info)


def find_key_file(store: Path) -> Path:
    """Where a server with this store keeps the key of its pseudonyms."""
    return store / "sessions" / "log.key"


def open_key(file: Path) -> bytes:
    """The key of the pseudonyms, made once; the file can be read by the server's account alone."""

    def make() -> bytes:
        key = secrets.token_bytes(_KEY_BYTES)
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(file, key)
        except OSError as err:
            logger.warning("Pseudonyms in the log change with every start: their key cannot be kept (%s)", err)
        return key

    return load_state(file, _read_key, make, "Images have other pseudonyms in the log from now on.")


def _read_key(content: bytes) -> bytes:
    if len(content) < _KEY_BYTES:
        raise ValueError(f"{len(content)} bytes are no key")
    return content


def describe_for_child(kind: str, names: str, key: Path) -> None:
    """Say how processes that this one starts are to write their lines.

    Args:
        kind: `TEXT` or `JSON`.
        names: `HASHED` or `PLAIN`.
        key: File of the key.
    """
    _told_to_children.clear()
    if (kind, names) != (TEXT, PLAIN):
        _told_to_children.update(kind=kind, names=names, key=str(key))


def make_environment() -> dict[str, str]:
    """What a process that this one starts finds in its environment: how to write its lines, and for which request."""
    if not _told_to_children:
        return {}
    note = find_request()
    return {ENVIRONMENT: json.dumps({**_told_to_children, "request": note.id if note is not None else ""})}


def follow_parent(
    known: Callable[[], Collection[str]], strip: Callable[[str], str], environment: Mapping[str, str] = os.environ
) -> None:
    """Write this process's lines as the one that started it says.

    Args:
        known: Names to hide, see `Names.watch`.
        strip: See `Names`.
        environment: With what `make_environment` gave.
    """
    text = environment.get(ENVIRONMENT)
    if not text:
        return
    told = json.loads(text)
    _told_by_parent.clear()
    _told_by_parent.update(told)
    names = None
    if told["names"] == HASHED:
        names = Names(open_key(Path(told["key"])), PROGRAM_WORDS, (sys.prefix,), strip)
        names.watch(known)
    configure(told["kind"], names)
