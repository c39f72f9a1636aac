"""How this server writes its log, see `progidiff.logs`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence

from progidiff import logs
from progidiff.images.formats import strip_suffix
from progidiff.prompts.structures import STRUCTURES
from progidiff.proposals.request import OPTION_NAMES
from progidiff.server.options import ServerOptions
from progidiff.users import Role


def set_up(options: ServerOptions, folders: Sequence[str]) -> logs.Names | None:
    """Have all handlers write as the options say, and the processes that are started from here too.

    Args:
        options: From `--conf`.
        folders: Of the server, beside those that the options name; they are told in the log as they are.

    Returns:
        What takes names out of the lines; None if they are told.
    """
    hides = (options.log_names or (logs.HASHED if options.log == logs.JSON else logs.PLAIN)) == logs.HASHED
    key = logs.find_key_file(options.store)
    names = None
    if hides:
        given = (options.store, options.model_dir, options.adapters, options.textdiff, options.users_file)
        own = [str(folder) for folder in given if folder is not None]
        own += [folder for folder in folders if "://" not in folder]
        words = {*logs.PROGRAM_WORDS, *STRUCTURES, *OPTION_NAMES, *Role}
        words |= {option.name for option in dataclasses.fields(ServerOptions)}
        names = logs.Names(logs.open_key(key), words, [*own, tempfile.gettempdir()], strip_suffix)
    logs.configure(options.log, names)
    logs.describe_for_child(options.log, logs.HASHED if hides else logs.PLAIN, key)
    return names
