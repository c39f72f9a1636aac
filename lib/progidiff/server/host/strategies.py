"""Our strategies as the host knows them: `/info/` lists them, and calls that the host makes itself go through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from progidiff.active_learning.settings import STRATEGIES
from progidiff.server.background.next_sample import Selection, Suggestion


class SelectionStrategy(Strategy):
    """One name that a client can ask for.

    Args:
        name: Of `acquisition.STRATEGIES`, or "random".
        description: For people.
        selection: Gives the chooser, which is there once the app is.
    """

    def __init__(self, name: str, description: str, selection: Callable[[], Selection]) -> None:
        self._name = name
        self._selection = selection
        super().__init__(description)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """The next image in the host's form, None if there is none."""
        chosen = self._selection().next(str(request.get("client_id") or "host"), self._name)
        return {**chosen.model_dump(), "id": chosen.image} if isinstance(chosen, Suggestion) else None


def build_strategies(selection: Callable[[], Selection], default: str) -> dict[str, Strategy]:
    """Every strategy by name; `random`, which OHIF asks for whatever is selected, is the default one."""
    alias = SelectionStrategy(
        "random", f"The default of this server, {default}; uniform_random is the true one", selection
    )
    return {**{name: SelectionStrategy(name, text, selection) for name, text in STRATEGIES.items()}, "random": alias}
