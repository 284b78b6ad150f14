"""Small models in folders, an app over one that a test holds at will, and a real server of it on a loopback port."""

import base64
import contextlib
import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from class_model import golden_model, golden_tokenizer
from golden_cases import GOLDEN
from PIL import Image
from starlette.testclient import TestClient

from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.sequence.classes import ClassEntry, ClassNames
from bitdance.serve.api import create_app
from bitdance.serve.model import ServedModel
from bitdance.serve.server import Server, address_of, listening_socket
from bitdance.serve.settings import Limits
from lfq_tokenizer.json_file import write_json

NAMES = ClassNames(tuple(ClassEntry((name,)) for name in ("tench", "crane", "fox", *(f"thing {i}" for i in range(3, 10)))))
SIZE = "32x32"
PATIENCE = 60  # seconds until a test that hangs fails


def text_folder(path: Path) -> Path:
    """The recorded text model with small defaults: 32×32 pixels in four blocks, two steps."""
    shutil.copytree(GOLDEN / "t2i_ckpt", path)
    defaults = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0}
    write_json({"defaults": defaults}, path / "bitdance.json")
    return path


def class_folder(path: Path) -> Path:
    """The recorded class model, of ten classes and 64×64 pixels."""
    defaults = {"guidance_scale": 2.0, "num_inference_steps": 2, "cfg_schedule": "constant"}
    LAYOUT.save(PictureModel(golden_model(16), golden_tokenizer(), NAMES, {"defaults": defaults}), path)
    return path


def opened(text: str | None) -> Image.Image:
    """The picture of an answer."""
    found = Image.open(io.BytesIO(base64.b64decode(text or "")))
    found.load()
    return found


def same(one: Image.Image, other: Image.Image) -> bool:
    return bool(np.array_equal(np.asarray(one.convert("RGB")), np.asarray(other.convert("RGB"))))


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """What `condition` gives once that is true; AssertionError where it does not become so."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, what or "waited too long"
        time.sleep(0.01)
    return found


class Hold:
    """Stands between the worker and a pipeline: remembers the batches and cancelled places, and stops the first batch after its
    first step until `go` is called."""

    def __init__(self, monkeypatch: Any, pipe: Any, hold: bool = True) -> None:
        self.batches: list[int] = []
        self.cancelled: list[int] = []
        self.steps = 0
        self.entered, self._gate = threading.Event(), threading.Event()
        if not hold:
            self._gate.set()
        generate, cancel = pipe.generate, pipe.cancel

        def held_generate(conditions: Any, *rest: Any, **more: Any) -> Any:
            *before, on_block = rest
            self.batches.append(len(conditions))

            def held(done: int, total: int, tokens: Any) -> None:
                self.steps += 1
                self.entered.set()
                assert self._gate.wait(PATIENCE)
                on_block(done, total, tokens)

            return generate(conditions, *before, held, **more)

        def seen_cancel(i: int) -> None:
            self.cancelled.append(i)
            cancel(i)

        monkeypatch.setattr(pipe, "generate", held_generate)
        monkeypatch.setattr(pipe, "cancel", seen_cancel)

    def wait(self) -> None:
        """Until a batch has begun."""
        assert self.entered.wait(PATIENCE)

    def go(self) -> None:
        """Let it go on."""
        self._gate.set()


@contextlib.contextmanager
def client(model: ServedModel, limits: Limits | None = None, **options: Any) -> Iterator[TestClient]:
    """A client of an app in this process; `.app.state.queue` is its queue."""
    with TestClient(create_app(model, limits, **options), raise_server_exceptions=False) as found:
        yield found


class Running:
    """A real server on a loopback port, in a thread."""

    def __init__(self, model: ServedModel, limits: Limits | None = None, **options: Any) -> None:
        app = create_app(model, limits, **options)
        self.queue, self.socket = app.state.queue, listening_socket("127.0.0.1", 0)
        self.url = address_of(self.socket)
        ready = threading.Event()
        self.server = Server(app, ready.set)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        assert ready.wait(PATIENCE)

    def close(self) -> None:
        """Stop it as a signal would, and wait."""
        if not self.server.should_exit:
            self.server.stop()
        self.thread.join(PATIENCE)
        self.socket.close()
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(model: ServedModel, limits: Limits | None = None, **options: Any) -> Iterator[Running]:
    """See `Running`."""
    found = Running(model, limits, **options)
    try:
        yield found
    finally:
        found.close()


def in_background(work: Callable[[], Any]) -> "Later":
    """Start it in a thread."""
    return Later(work)


class Later:
    """What a thread will have found."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._found: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._found.append(_tried(work)), daemon=True)
        self._thread.start()

    def result(self) -> Any:
        """Its value; what it raised is raised here."""
        self._thread.join(PATIENCE)
        assert self._found, "still at work"
        if isinstance(self._found[0], Exception):
            raise self._found[0]
        return self._found[0]


def _tried(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return error
