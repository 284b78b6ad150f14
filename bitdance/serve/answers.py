"""Tasks → what goes over the wire: answers, events of a stream, the state of a job."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bitdance.serve.errors import ApiError
from bitdance.serve.model import ServedModel
from bitdance.serve.openai_images import b64, size_text, usage
from bitdance.serve.queue import ImageQueue
from bitdance.serve.tasks import Event, Picture, Task

ALIVE = 15.0  # seconds between signs of life in a stream without events


def error_answer(error: ApiError) -> Response:
    """The error object with its status and headers."""
    return JSONResponse(error.body, error.status, error.headers)


def images_answer(model: ServedModel, task: Task) -> dict[str, Any]:
    """OpenAI's `ImagesResponse` of a finished task, with our `seeds` and `job`."""
    first, request = task.pictures[0].job, task.request
    data = []
    for picture in task.pictures:
        assert picture.made is not None
        text = b64(picture.made.file)
        form = {"url": f"data:image/{request.format};base64,{text}"} if request.as_url else {"b64_json": text}
        data.append({**form, "revised_prompt": None})
    counts = [_counts(model, picture) for picture in task.pictures]
    return {
        "created": task.created,
        "data": data,
        **_form(task, first.height, first.width),
        "usage": usage(sum(text for text, _ in counts), sum(image for _, image in counts)),
        "seeds": [picture.job.seed for picture in task.pictures],
        "job": task.id,
    }


def job_state(queue: ImageQueue, task: Task) -> dict[str, Any]:
    """A job as `/v1/jobs/ID` tells it; the answer itself is in "result" once it is done."""
    place = queue.position(task)
    return {
        "id": task.id,
        "object": "job",
        "status": task.status,
        "created": task.created,
        "n": len(task.pictures),
        "progress": round(task.progress, 4),
        "position": place,
        "estimated_seconds": None if place is None else queue.estimate(place + len(task.pictures)),
        "error": None if task.error is None else task.error.body["error"],
        "result": images_answer(queue.model, task) if task.status == "done" else None,
    }


async def plain_answer(queue: ImageQueue, task: Task, request: Request) -> Response:
    """Wait for all pictures. A client that leaves ends its task, unless it chose the job's id. Raises the task's ApiError."""
    listener = task.listen()

    async def finished() -> None:
        while (await listener.get()).name != "end":
            pass

    waiting = [asyncio.create_task(finished()), asyncio.create_task(_left(request))]
    try:
        while task.ended is None and not any(one.done() for one in waiting):
            await asyncio.wait(waiting, timeout=_remaining(task), return_when=asyncio.FIRST_COMPLETED)
            _ = task.over  # a late one ends here
    finally:
        for one in waiting:
            one.cancel()
        _leave(queue, task, listener)
    if task.error is not None:
        raise task.error
    if task.ended is None:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(await asyncio.to_thread(images_answer, queue.model, task), headers={"x-job-id": task.id})


def stream_answer(queue: ImageQueue, task: Task) -> Response:
    """Server-sent events: previews, each picture as it is finished, at last perhaps an error."""
    listener = task.listen()

    async def events() -> AsyncIterator[bytes]:
        while True:
            try:
                event = await asyncio.wait_for(listener.get(), min(ALIVE, _remaining(task)))
            except TimeoutError:
                if not task.over:  # a late one ends here, which is the next event
                    yield b": waiting\n\n"
                continue
            if event.name == "end":
                break
            yield await asyncio.to_thread(_picture_event, queue.model, task, event)
        if task.error is not None:
            yield _event({"type": "error", **task.error.body})

    headers = {"x-job-id": task.id, "cache-control": "no-store", "x-accel-buffering": "no"}
    return _Stream(events(), lambda: _leave(queue, task, listener), headers)


class _Stream(StreamingResponse):
    """Calls `close` however the stream ends, also where it never began."""

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def _leave(queue: ImageQueue, task: Task, listener: Any) -> None:
    alone = task.leave(listener)
    if alone and not task.kept and task.ended is None:
        queue.end(task)


async def _left(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _remaining(task: Task) -> float:
    return max(0.0, task.deadline - asyncio.get_running_loop().time()) + 0.02  # both count as time.monotonic does


def _event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


def _picture_event(model: ServedModel, task: Task, event: Event) -> bytes:
    kind = "image_edit" if task.edit else "image_generation"
    picture = task.pictures[event.picture]
    data: dict[str, Any] = {"b64_json": b64(event.file), "created_at": task.created}
    data |= _form(task, picture.job.height, picture.job.width)
    data |= {"index": event.picture, "seed": picture.job.seed, "job": task.id}
    if event.name == "preview":
        return _event({"type": f"{kind}.partial_image", "partial_image_index": event.preview, **data})
    return _event({"type": f"{kind}.completed", "usage": usage(*_counts(model, picture)), **data})


def _form(task: Task, height: int, width: int) -> dict[str, Any]:
    size = size_text(height, width)
    return {"size": size, "quality": "auto", "background": "opaque", "output_format": task.request.format}


def _counts(model: ServedModel, picture: Picture) -> tuple[int, int]:
    assert picture.made is not None
    return picture.made.text_tokens, model.image_tokens(picture.job)
