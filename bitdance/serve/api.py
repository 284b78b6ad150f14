"""The app: OpenAI's images API over one model, jobs that can be fetched again, and what operators ask."""

import asyncio
import io
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Message

from bitdance import __version__
from bitdance.picture import metadata_of, open_picture
from bitdance.serve.answers import error_answer, job_state, plain_answer, stream_answer
from bitdance.serve.errors import ApiError, bad_request
from bitdance.serve.gate import Gate
from bitdance.serve.metrics import Metrics
from bitdance.serve.model import Plan, ServedModel
from bitdance.serve.openai_images import ImageRequest, from_form, read_request
from bitdance.serve.queue import ImageQueue
from bitdance.serve.schema import edit_schema, generation_schema
from bitdance.serve.settings import Limits, check_origins
from bitdance.serve.tasks import Task
from bitdance.serve.worker import LOG
from bitdance.values import shown
from lfq_tokenizer.json_file import parse_json
from lfq_tokenizer.text import printable

PAGE = Path(__file__).parent / "page"
JSON_BYTES = 2 << 20  # of a request without pictures: the longest prompt takes 1.5 MB where every letter is an escape
UPLOADS = 8  # forms that are received at once, which bounds the memory that they take


def create_app(
    model: ServedModel,
    limits: Limits | None = None,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    page: Path = PAGE,
) -> FastAPI:
    """The app of a loaded model; its worker threads live from startup to shutdown. `cors`: origins of other pages that may call.
    `page`: a folder whose index.html, if there is one, is shown at `/`. `app.state.queue` is the queue."""
    limits, metrics, cors = limits or Limits(), Metrics(), check_origins(cors)
    queue = ImageQueue(model, limits, metrics)
    uploads = asyncio.Semaphore(UPLOADS)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        queue.start()
        try:
            yield
        finally:
            queue.stop()
            await asyncio.to_thread(queue.join)

    middleware = [Middleware(Gate, metrics=metrics, api_key=api_key, origins=cors)]
    if cors:
        allowed: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["x-job-id", "retry-after"]}
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(cors), **allowed))
    app = FastAPI(title="bitdance", version=__version__, lifespan=lifespan, middleware=middleware)
    app.state.queue = queue
    _add_errors(app)

    @app.post("/v1/images/generations", openapi_extra=generation_schema(model))
    async def generations(request: Request) -> Response:
        """Make pictures of a prompt or a class."""
        if not request.headers.get("content-type", "").lower().startswith("application/json"):
            raise bad_request("send JSON, with the header content-type: application/json")
        fields = _object(await _body(request, limits, min(limits.body_bytes, JSON_BYTES)))
        wanted = read_request(fields, model.words, limits)
        return await _answered(request, wanted, await asyncio.to_thread(model.plan, wanted, limits), False)

    @app.post("/v1/images/edits", openapi_extra=edit_schema(model))
    async def edits(request: Request) -> Response:
        """Change a picture, where the kind of model can."""
        if not model.edits:
            raise bad_request(f"a model of the kind {model.pipe.kind} cannot edit pictures", None, "unsupported")
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise bad_request("send a form, with the header content-type: multipart/form-data")
        async with uploads:
            fields, files = await _form(request, limits)
            wanted = read_request(from_form(fields), model.words, limits, edit=True)
            plan = await asyncio.to_thread(_plan_edit, model, wanted, files, limits)
            del files
        return await _answered(request, wanted, plan, True)

    async def _answered(request: Request, wanted: ImageRequest, plan: Plan, edit: bool) -> Response:
        number = wanted.job or f"job-{secrets.token_urlsafe(18)}"
        task = queue.submit(Task(number, plan, wanted, limits.seconds, edit))
        return stream_answer(queue, task) if wanted.stream else await plain_answer(queue, task, request)

    known = {"id": model.name, "object": "model", "created": 0, "owned_by": "bitdance", **model.describe()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served. Any name in a request means it."""
        return {"object": "list", "data": [known]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The same, with the names of its classes; any name means it."""
        return {**known, "class_names": model.class_names}

    @app.get("/v1/jobs/{number}")
    async def job(number: str) -> Response:
        """How far a job is; its pictures once it is done."""
        return JSONResponse(await asyncio.to_thread(job_state, queue, queue.find(number)))

    @app.delete("/v1/jobs/{number}")
    async def cancel(number: str) -> dict[str, Any]:
        """End a job, or forget a finished one."""
        task = queue.find(number)
        queue.end(task)
        return {"id": task.id, "object": "job", "status": task.status, "deleted": True}

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken in, else 503."""
        state = {"status": "ok" if queue.healthy else "stopping", "waiting": queue.waiting, "running": queue.running}
        return JSONResponse(state, 200 if queue.healthy else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        """What Prometheus reads."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if (page / "index.html").is_file():
        app.mount("/", StaticFiles(directory=page, html=True))
    else:
        app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    return app


def _add_errors(app: FastAPI) -> None:
    async def told(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_answer(error)

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_answer(ApiError(error.status_code, printable(str(error.detail))[:200]))

    async def unknown(_: Request, error: Exception) -> Response:
        LOG.error("unexpected", exc_info=error)
        return error_answer(ApiError(500, "the server met an error of its own; its log says which", None, "internal", False))

    app.add_exception_handler(ApiError, told)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)


async def _body(request: Request, limits: Limits, most: int) -> bytes:
    """What the client sends. ApiError 413 beyond the limit, before all of it is read, and 408 when it takes too long."""
    too_large = ApiError(413, f"the request is larger than {most:,} bytes", None, "too_large")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 18 or int(said) > most):
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {limits.body_seconds:g} s", None, "slow", False) from None
    except ClientDisconnect:
        raise bad_request("the client left") from None
    return bytes(content)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = parse_json(body, "the request", checked_later=True)
    except ValueError as error:
        raise bad_request(error, None, "invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request(f'the request is {shown(value)}; an object is allowed, as {{"prompt": "a fox"}}', None, "invalid_json")
    return value


async def _form(request: Request, limits: Limits) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """Texts and files of a form. ApiError 400 for a file that is given twice."""
    body = await _body(request, limits, limits.body_bytes)

    async def again() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    texts: list[tuple[str, str]] = []
    files: dict[str, bytes] = {}
    async with Request(request.scope, again).form(max_files=20, max_fields=50, max_part_size=limits.body_bytes) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                texts.append((name, value))
                continue
            name = "image" if name == "image[]" else name
            if name in files:
                more = "; one picture is changed at a time" if name == "image" else ""
                raise bad_request(f"{shown(name)} is given twice{more}", name[:100])
            files[name] = await value.read()
    return texts, files


def _plan_edit(model: ServedModel, wanted: ImageRequest, files: dict[str, bytes], limits: Limits) -> Plan:
    if unknown := sorted(set(files) - {"image", "mask"}):
        raise bad_request(f"unknown file {shown(unknown[0])}; image and mask are known", unknown[0][:100])
    if "image" not in files:
        raise bad_request("image is missing; give the file of a picture", "image", "missing_required_parameter")
    try:
        picture = open_picture(io.BytesIO(files["image"]), "image", limits.pixels)
        mask = None if "mask" not in files else open_picture(io.BytesIO(files["mask"]), "mask", limits.pixels)
    except ValueError as error:
        raise bad_request(error, str(error).split(" ")[0]) from None
    white = None if mask is None else _white_where_clear(mask, picture)
    return model.plan_edit(wanted, picture.convert("RGB"), metadata_of(picture) or {}, white, limits)


def _white_where_clear(mask: Image.Image, picture: Image.Image) -> Image.Image:
    """OpenAI's mask, transparent where something is drawn anew → ours, white there."""
    if mask.size != picture.size:
        sizes = f"mask has {mask.width}×{mask.height} pixels, image {picture.width}×{picture.height}"
        raise bad_request(f"{sizes}; make them equal", "mask")
    if "A" not in mask.getbands() and "transparency" not in mask.info:
        raise bad_request("mask has no transparency; make it transparent (alpha 0) where the picture may change", "mask")
    return mask.convert("RGBA").getchannel("A").point([255] + [0] * 255)
