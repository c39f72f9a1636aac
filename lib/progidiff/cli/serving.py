"""``progidiff serve``: the server, with the options of ``monailabel start_server``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from progidiff.errors import RequestError
from progidiff.params import read_choice
from progidiff.storage import app_folder

_SAMPLES = app_folder.CHECKOUT / "sample_datastore"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class HostWords(TyperCommand):
    """Takes the words of ``monailabel start_server`` too: ``--conf name value`` and ``--ssl_keyfile``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write them as the other commands do."""
        return super().parse_args(ctx, rewrite_words(args))


def rewrite_words(words: list[str]) -> list[str]:
    """The words of the host's command line in the spelling of this one.

    Example:
        >>> rewrite_words(["--conf", "device", "cpu", "--ssl_keyfile", "my_key.pem", "--conf", "store=a b"])
        ['--conf', 'device=cpu', '--ssl-keyfile', 'my_key.pem', '--conf', 'store=a b']
    """
    written: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("--conf", "-c") and len(rest) > 1 and "=" not in rest[0] and not rest[1].startswith("-"):
            written += [word, f"{rest.pop(0)}={rest.pop(0)}"]
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            written.append(name.replace("_", "-") + equals + value)
        else:
            written.append(word)
    return written


def serve(
    app: Annotated[
        Path | None,
        typer.Option(
            "--app",
            "-a",
            help="Folder of the MONAI Label app. Default: the one that comes with this.",
            show_default=False,
        ),
    ] = None,
    studies: Annotated[
        str | None,
        typer.Option(
            "--studies",
            "-s",
            help="Folder of images, or the address of a DICOMweb server. Default: a checkout's sample images.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            "-i",
            help="Interface to listen on. 0.0.0.0 is every one; other machines are still refused until a login is set "
            "up (--conf token_file=FILE or users_file=FILE).",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="TCP port.", min=1, max=65535)] = 8000,
    conf: Annotated[
        list[str] | None,
        typer.Option("--conf", "-c", help="An option of the app as NAME=VALUE; may be repeated.", show_default=False),
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="Certificate, for HTTPS without a proxy.", show_default=False)
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its key.", show_default=False)] = None,
    ssl_keyfile_password: Annotated[
        str | None,
        typer.Option(help="The key's password.", envvar="PROGIDIFF_SSL_KEYFILE_PASSWORD", show_default=False),
    ] = None,
    ssl_ca_certs: Annotated[
        Path | None, typer.Option(help="Authorities whose certificates clients may show.", show_default=False)
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path under which a proxy shows the server.", show_default=False)] = "",
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
    log_level: Annotated[
        str, typer.Option("--log-level", "--verbose", "-v", help=f"Of the server and the app: {', '.join(_LEVELS)}.")
    ] = "INFO",
    log_config: Annotated[
        Path | None,
        typer.Option("--log-config", "-l", help="Python's logging configuration as JSON.", show_default=False),
    ] = None,
    limit_concurrency: Annotated[
        int | None, typer.Option(help="Most connections at a time that are served.", min=1, show_default=False)
    ] = None,
) -> None:
    """Start the MONAI Label server. Ctrl-C stops it."""
    from progidiff.server.start import StartOptions, start

    start(
        StartOptions(
            app=app or app_folder.find_app(),
            studies=pick_studies(studies),
            host=host,
            port=port,
            conf=parse_conf(conf or []),
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
            ssl_keyfile_password=ssl_keyfile_password,
            ssl_ca_certs=ssl_ca_certs,
            root_path=root_path,
            access_log=access_log,
            log_level=read_choice(log_level, "--log-level", _LEVELS),
            log_config=log_config,
            limit_concurrency=limit_concurrency,
        )
    )


def pick_studies(studies: str | None) -> str:
    """What --studies names, else the sample images of a checkout.

    Raises:
        RequestError: if there are none.
    """
    if studies is not None:
        return studies
    if not _SAMPLES.is_dir():
        raise RequestError("What is to be served? Name a folder of images with --studies, or a DICOMweb address.")
    return str(_SAMPLES)


def parse_conf(entries: list[str]) -> tuple[tuple[str, str], ...]:
    """The entries of --conf, in pairs.

    Raises:
        RequestError: if one has no value.

    Example:
        >>> parse_conf(["device=cpu", "backbone=a=b c"])
        (('device', 'cpu'), ('backbone', 'a=b c'))
    """
    pairs = []
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise RequestError(f"Option --conf needs NAME=VALUE, got '{entry}'. Write for example --conf device=cpu.")
        pairs.append((name, value))
    return tuple(pairs)
