"""All our addresses, in the order in which they are asked; a module with routes adds its line here.

``python -m progidiff.server.routes.table`` writes them into docs/security.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from progidiff.server.gate.endpoints import Endpoints, EndpointTable, build_table
from progidiff.server.routes import (
    dicomweb,
    health,
    host,
    inference,
    labels,
    logins,
    next_sample,
    ohif,
    operations,
    overview,
    pictures,
    readings,
    review,
    segmentations,
    structures,
    training,
)

_BUILDERS = (
    logins.build_endpoints,
    inference.build_endpoints,
    dicomweb.build_endpoints,
    ohif.build_endpoints,
    segmentations.build_endpoints,
    labels.build_endpoints,
    review.build_endpoints,
    overview.build_endpoints,
    pictures.build_endpoints,
    readings.build_endpoints,
    structures.build_endpoints,
    next_sample.build_endpoints,
    training.build_endpoints,
    health.build_endpoints,
    operations.build_endpoints,
    host.build_endpoints,  # Stays last: it closes addresses of the host that nobody above answers.
)

_BEGIN, _END = "<!-- table of addresses: python -m progidiff.server.routes.table -->", "<!-- end of the table -->"


def build_endpoints() -> list[Endpoints]:
    """What each module declares."""
    return [build() for build in _BUILDERS]


def insert_table(page: str, table: EndpointTable) -> str:
    """The page with this table between its marks.

    Raises:
        ValueError: if the marks are not there.
    """
    before, after = page.index(_BEGIN) + len(_BEGIN), page.index(_END)
    return f"{page[:before]}\n{table.render()}\n{page[after:]}"


def main(file: str = "docs/security.md") -> None:
    """Write the table into the page."""
    path = Path(file)
    page = insert_table(path.read_text(encoding="utf-8"), build_table(build_endpoints()))
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
