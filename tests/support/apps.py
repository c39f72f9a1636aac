"""The real app in the tests' own process, behind a client: as `support.servers`, without a server to start."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monailabel.app
from monailabel.config import settings
from monailabel.interfaces.utils import app as host
from starlette.testclient import TestClient

from progidiff import logs
from progidiff.images import decoding
from support.servers import APP, copy_app

LOCAL, REMOTE = ("127.0.0.1", 50_000), ("192.168.7.9", 50_000)


@contextlib.contextmanager
def open_app(studies: Path, model: Path, *conf: str) -> Iterator[Any]:
    """The app in the host's web application, which is as it was afterwards.

    Args:
        studies: Folder of images.
        model: Model folder.
        conf: Names and values of `--conf`, in turns; nothing is scored in the background.
    """
    formatters = {handler: handler.formatter for handler in logs._list_handlers()}
    spec = importlib.util.spec_from_file_location("progidiff_app_in_tests", APP / "main.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {"model_dir": str(model), "device": "cpu", "score_pool": "off"}
    options |= dict(zip(conf[::2], conf[1::2], strict=True))
    web = monailabel.app.app
    routes, middlewares, handlers = list(web.router.routes), list(web.user_middleware), dict(web.exception_handlers)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = studies.parent / "in-process"
    folder.mkdir(exist_ok=True)
    app_dir = folder / "app" if (folder / "app").is_dir() else copy_app(folder)
    before, was_apart = (
        (settings.MONAI_LABEL_APP_DIR, settings.MONAI_LABEL_STUDIES, dict(host.apps)),
        decoding.is_apart(),
    )
    settings.MONAI_LABEL_APP_DIR, settings.MONAI_LABEL_STUDIES = str(app_dir), str(studies)
    try:
        app = module.ProGiDiffApp(str(app_dir), str(studies), options)
        host.apps[f"{app_dir}{studies}"] = app
        yield app
    finally:
        app.context.training.close()
        decoding.read_apart(was_apart)
        settings.MONAI_LABEL_APP_DIR, settings.MONAI_LABEL_STUDIES, others = before
        host.clear_cache()
        host.apps.update(others)
        web.router.routes[:] = routes
        web.user_middleware, web.exception_handlers = middlewares, handlers
        web.middleware_stack = None
        for number, handler in signals.items():
            signal.signal(number, handler)
        for handler, formatter in formatters.items():
            handler.setFormatter(formatter)
        logging.captureWarnings(False)
        threading.excepthook = threading.__excepthook__
        logs.describe_for_child(logs.TEXT, logs.PLAIN, studies)


def connect(peer: tuple[str, int] = LOCAL, host_name: str = "127.0.0.1:8000", **options: Any) -> TestClient:
    """A client of the app that `open_app` opened."""
    return TestClient(
        monailabel.app.app,
        base_url=f"http://{host_name}",
        client=peer,
        follow_redirects=False,
        raise_server_exceptions=False,
        **options,
    )
