"""The part of the command line that says who may connect: ``progidiff users add | list | remove | token``."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from progidiff.cli.serving import pick_studies
from progidiff.errors import RequestError
from progidiff.storage.state import default_store
from progidiff.users import (
    LOGIN_LINK,
    TOKEN_BYTES,
    Token,
    UsersFile,
    check_name,
    find_local_token,
    open_local_token,
    read_role,
)

NameArgument = Annotated[str, typer.Argument(help="Letters, digits, '.', '_', '@' or '-'.")]
FileOption = Annotated[
    Path | None, typer.Option("--file", help="The users file, as in --conf users_file. Required.", show_default=False)
]
RoleOption = Annotated[
    str, typer.Option(help="read: look; annotate: also ask for proposals and save; administer: everything.")
]


def register(app: Any) -> None:
    """Add the commands to the command line `app` (a `typer.Typer`)."""
    users = typer.Typer(
        no_args_is_help=True, help="Users and tokens that may connect from other hosts.", rich_markup_mode=None
    )
    users.command("add")(add_user)
    users.command("list")(list_users)
    users.command("remove")(remove_user)
    users.command("token")(make_token)
    users.command("link")(print_link)
    app.add_typer(users, name="users")


def add_user(name: NameArgument, role: RoleOption = "annotate", file: FileOption = None) -> None:
    """Add a user or set a new password and role; the password is asked for, or read from standard input if that is no
    terminal.

    A running server sees the change at once.
    """
    path = _require(file)
    chosen = read_role(role, "--role")
    UsersFile(path).put(check_name(name, "NAME"), chosen, _read_password(name))
    typer.echo(f"{name} may {chosen}, in {path}", err=True)


def list_users(file: FileOption = None) -> None:
    """Print names and roles."""
    for name, account in sorted(UsersFile(_require(file)).read().items()):
        typer.echo(f"{name}\t{account.role}")


def remove_user(name: NameArgument, file: FileOption = None) -> None:
    """Remove a user; whoever is logged in under the name is out at once."""
    UsersFile(_require(file)).remove(name)


def make_token(name: NameArgument, role: RoleOption = "annotate") -> None:
    """Print a line for the token file (--conf token_file) with a new token; the part after the last colon is what
    clients send.
    """
    secret = secrets.token_urlsafe(TOKEN_BYTES)
    token = Token.of(check_name(name, "NAME"), read_role(role, "--role"), secret)
    typer.echo(f"{token.name}:{token.role}:{secret}")


def print_link(
    studies: Annotated[
        str | None, typer.Option(help="What the server serves, as for `progidiff serve`.", show_default=False)
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="The server's --conf store, if it has one.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="The server's port.", min=1, max=65535)] = 8000,
) -> None:
    """Print the link that logs this machine in, where neither users nor tokens are configured.

    What follows `token=` is the password for 3D Slicer (without a name) and the token for scripts.
    """
    folder = store or default_store(pick_studies(studies))
    file = find_local_token(folder)
    if not file.is_file():
        raise RequestError(f"There is no token in '{file}'. Start the server once, or name what it serves: --studies.")
    typer.echo(f"http://127.0.0.1:{port}{LOGIN_LINK}{open_local_token(folder)}")


def _read_password(name: str) -> str:
    if sys.stdin.isatty():
        return str(typer.prompt(f"Password for {name}", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\r\n")


def _require(file: Path | None) -> Path:
    if file is None:
        raise RequestError("Which users file? Add --file FILE, the one of --conf users_file; `add` creates it.")
    return file.expanduser()
