"""Starting the server in this process: MONAI Label's own start, told in our words where it cannot.

`progidiff serve` and ``monailabel start_server --app apps/progidiff`` run the same host with the same app and the same
options. An installed wheel carries the host's package unchanged and without its list of dependencies, most of which
this app never loads; a checkout has it installed beside it.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progidiff.errors import ModelError, ProGiDiffError, RequestError
from progidiff.server.options import ServerOptions
from progidiff.storage.app_folder import PACKAGED_HOST
from progidiff.storage.folders import check_writable
from progidiff.users import UsersFile, read_tokens

HOST = "monailabel==0.8.5"
"""The host that everything was tested with."""

EXTRA_TRIES = 20
"""Ports above a taken one that are tried before none is proposed."""


@dataclass(frozen=True)
class StartOptions:
    """What starts a server.

    Attributes:
        app: Folder of the MONAI Label app.
        studies: Folder of images, or the address of a DICOMweb server.
        host: Interface to listen on.
        port: TCP port.
        conf: Options of the app.
        ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs: HTTPS without a proxy; None for HTTP.
        root_path: Path under which a proxy shows the server.
        access_log: Whether every request is logged.
        log_level: Of the server and the app.
        log_config: A logging configuration of one's own, JSON.
        limit_concurrency: Most connections and requests at a time; None for no limit of the web server's own.
    """

    app: Path
    studies: str
    host: str = "127.0.0.1"
    port: int = 8000
    conf: tuple[tuple[str, str], ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: Path | None = None
    root_path: str = ""
    access_log: bool = False
    log_level: str = "INFO"
    log_config: Path | None = None
    limit_concurrency: int | None = None

    def to_words(self) -> list[str]:
        """The words of ``monailabel start_server`` that mean the same.

        Example:
            >>> StartOptions(Path("app"), "scans", conf=(("device", "cpu"),)).to_words()[-3:]
            ['--conf', 'device', 'cpu']
        """
        words = ["start_server", "--app", str(self.app), "--studies", self.studies]
        words += ["--host", self.host, "--port", str(self.port)]
        words += ["--verbose", self.log_level, "--log_level", self.log_level.lower()]
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", str(value)]
        words += ["--root_path", self.root_path] if self.root_path else []
        words += ["--access_log"] if self.access_log else []
        words += ["--log_config", str(self.log_config)] if self.log_config else []
        words += ["--limit_concurrency", str(self.limit_concurrency)] if self.limit_concurrency is not None else []
        for name, value in self.conf:
            words += ["--conf", name, value]
        return words


def start(options: StartOptions) -> None:
    """Serve until a signal says stop.

    Raises:
        RequestError: if an option, the port or a file does not do.
        StoreError: if a folder cannot be written.
        ModelError: if the host is not there.
        ProGiDiffError: whatever else keeps the app from starting.
    """
    check(options)
    use_packaged_host()
    main = _import_host()
    failures: list[ProGiDiffError] = []
    host_app = sys.modules["monailabel.app"]
    host_app.app_instance = _remember_failure(host_app.app_instance, failures)  # type: ignore[attr-defined]
    parser = main()
    try:
        parser.action_start_server(parser.args_parser().parse_args(options.to_words()))
    except SystemExit:
        if failures:
            raise failures[0] from None
        raise


def check(options: StartOptions) -> None:
    """Refuse in a moment what the host would find out in half a minute, with a traceback.

    Raises:
        RequestError: if an option, the port or a file does not do.
        StoreError: if a folder cannot be written, or its disk is full.
    """
    if not (options.app / "main.py").is_file():
        raise RequestError(f"There is no app in '{options.app}' (no main.py). Name its folder with --app.")
    is_folder = "://" not in options.studies
    if is_folder and not Path(options.studies).is_dir():
        raise RequestError(f"There is no folder '{options.studies}' to serve. Name one with --studies.")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "log_config"):
        file = getattr(options, name)
        if file is not None and not file.is_file():
            raise RequestError(f"Option --{name.replace('_', '-')} names '{file}', and there is no such file.")
    settings = ServerOptions.from_conf(dict(options.conf), options.studies)
    if settings.users_file is not None:
        UsersFile(settings.users_file).read()
    if settings.token_file is not None:
        read_tokens(settings.token_file)
    if is_folder:
        check_writable(Path(options.studies), "images and labels", "name another with --studies")
    check_writable(settings.store, "proposals, history and scores", "name another with --conf store=FOLDER")
    check_writable(options.app, "the host's log", "name a copy of the app with --app")
    check_port(options.host, options.port)


def check_port(host: str, port: int) -> None:
    """Refuse an address that nothing can listen on.

    Raises:
        RequestError: if the port is taken or reserved, or the interface is not one of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except socket.gaierror as err:
        raise RequestError(
            f"--host {host}: there is no such interface ({err.strerror}). Use 127.0.0.1 for this machine only, or "
            "0.0.0.0 for every interface."
        ) from err
    try:
        _try_address(family, kind, address)
    except OSError as err:
        raise RequestError(
            _explain_port(err, host, port, lambda other: _is_free(family, kind, address, other))
        ) from err


def _try_address(family: int, kind: int, address: tuple[Any, ...]) -> None:
    with socket.socket(family, kind) as probe:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _is_free(family: int, kind: int, address: tuple[Any, ...], port: int) -> bool:
    try:
        _try_address(family, kind, (address[0], port, *address[2:]))
    except OSError:
        return False
    return True


def _explain_port(err: OSError, host: str, port: int, is_free: Callable[[int], bool]) -> str:
    if err.errno == errno.EADDRINUSE:
        others = range(port + 1, min(port + 1 + EXTRA_TRIES, 65536))
        free = next((other for other in others if is_free(other)), None)
        cure = f"choose another: --port {free}" if free else "choose another with --port"
        return f"Port {port} of {host} is taken by another program, perhaps another server. Stop that one, or {cure}."
    if err.errno in (errno.EACCES, errno.EPERM):
        return (
            f"Port {port} is reserved for the administrator ({err.strerror}). Choose one from 1024 on with --port, and "
            "let a proxy answer on 443."
        )
    return (
        f"--host {host}: this machine has no such interface ({err.strerror}). Use 127.0.0.1 for this machine only, or "
        "0.0.0.0 for every interface."
    )


def use_packaged_host(folder: Path = PACKAGED_HOST) -> bool:
    """Have this process, and those that it starts, import the host that the package carries.

    Returns:
        Whether it carries one; a checkout does not.
    """
    if not folder.is_dir():
        return False
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH", "")
    if str(folder) not in before.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    return True


def _import_host() -> Any:
    try:
        importlib.import_module("monailabel.app")
        from monailabel.main import Main
    except ImportError as err:
        raise ModelError(
            f"MONAI Label, the server's host, cannot be imported ({err}). In a checkout run `make setup`; elsewhere "
            f"install the wheel that `make wheel` builds, which carries it, or: pip install --no-deps {HOST}."
        ) from err
    return Main


def _remember_failure(build: Callable[..., Any], failures: list[ProGiDiffError]) -> Callable[..., Any]:
    """`build`, with what it refuses kept, and without the traceback that the web server would log of it."""

    def build_or_remember(*arguments: Any, **options: Any) -> Any:
        try:
            return build(*arguments, **options)
        except ProGiDiffError as err:
            failures.append(err)
            logging.getLogger("uvicorn.error").addFilter(lambda record: not record.getMessage().startswith("Traceback"))
            raise

    return build_or_remember
