"""What happens over time: batches, clients that leave, jobs, limits, stopping; with OpenAI's own client against a real server."""

import asyncio
import base64
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serve_model import SIZE, Hold, client, in_background, running, text_folder, until

from bitdance.cli import main
from bitdance.picture import metadata_of
from bitdance.serve.model import ServedModel
from bitdance.serve.settings import Limits

PATH = "/v1/images/generations"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> ServedModel:
    return ServedModel.load(str(text_folder(tmp_path_factory.mktemp("models") / "text")), ("cpu",))


@pytest.fixture(scope="module")
def picture_of_a(model: ServedModel) -> bytes:
    """The pixels of "a" with seed 1."""
    return np.asarray(model.pipe("a", seed=1).images[0]).tobytes()


def pixels(text: str) -> bytes:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).tobytes()


def asker(server: Any, retries: int = 0, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=retries, timeout=60)


def test_openai_s_client_is_served(model: ServedModel, picture_of_a: bytes) -> None:
    """Plain, several, streamed, own fields, errors: what existing tools do."""
    with running(model, Limits(preview_share=1e9), api_key="geheim") as server:
        images = asker(server, key="geheim").images
        found = images.generate(prompt="a", model="gpt-image-1", n=2, size=SIZE, quality="high", extra_body={"seed": 0})
        assert found.data is not None and pixels(found.data[1].b64_json or "") == picture_of_a
        assert found.usage is not None and found.usage.output_tokens == 32 and found.output_format == "png"
        assert found.model_extra == {"seeds": [0, 1], "job": found.model_extra["job"]}  # type: ignore[index]
        events = list(images.generate(prompt="a", stream=True, partial_images=2, extra_body={"seed": 1}))
        assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
        assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
        shown = [pixels(event.b64_json) for event in events]
        assert shown[2] == picture_of_a and len(set(shown)) == 3
        assert {event.size for event in events} == {SIZE} and {event.output_format for event in events} == {"png"}
        assert events[2].usage.output_tokens == 16  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError, match="nearest as size") as error:
            images.generate(prompt="a", size="1000x1000")
        assert error.value.param == "size" and error.value.code == "unsupported_size"
        with pytest.raises(openai.BadRequestError, match="cannot edit"):
            images.edit(image=b"x", prompt="a")
        with pytest.raises(openai.AuthenticationError):
            asker(server).images.generate(prompt="a")
        assert [one.id for one in asker(server, key="geheim").models.list()] == ["text"]


def test_pictures_of_a_stream_of_several_come_as_they_are_finished(model: ServedModel, picture_of_a: bytes) -> None:
    with running(model) as server:
        events = list(asker(server).images.generate(prompt="a", n=3, stream=True, extra_body={"seed": 0}))
    assert [event.model_extra["index"] for event in events] == [0, 1, 2]  # type: ignore[index]
    assert pixels(events[1].b64_json) == picture_of_a


def test_previews_are_bounded_by_their_share_of_the_time(model: ServedModel) -> None:
    """A decode costs: with no share to spend, the first is made and no other."""
    with running(model, Limits(preview_share=0)) as server:
        events = list(asker(server).images.generate(prompt="a", stream=True, partial_images=3))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]


def test_waiting_requests_share_batches(model: ServedModel, monkeypatch: Any) -> None:
    """Complaint (a): in truth one after another. Equal ones join, others do not, and the batch is bounded."""
    hold = Hold(monkeypatch, model.pipe)
    with client(model, Limits(batch_size=4)) as api:
        asked = [in_background(lambda: api.post(PATH, json={"prompt": "first"}))]
        hold.wait()
        fields = [{"n": 2}, {"steps": 3}, {}, {}, {"size": "16x32"}, {"size": "16x32"}, {}]
        for place, more in enumerate(fields, 1):
            asked.append(in_background(lambda m=more: api.post(PATH, json={"prompt": "a", **m})))
            until(lambda p=place: api.app.state.queue.waiting == p)
        hold.go()
        assert [one.result().status_code for one in asked] == [200] * 8
    assert hold.batches == [1, 4, 1, 2, 1]  # n = 2 with two more, three steps, two of 16x32, what did not fit into the first


def test_who_leaves_ends_its_picture_alone(model: ServedModel, picture_of_a: bytes, monkeypatch: Any) -> None:
    """Complaint (b): work goes on after the client left. Here a closed connection of a stream, one of a plain request, and a
    DELETE, in a batch with one who stays."""
    rows: list[int] = []
    sample = model.pipe._block_sampler

    def counted(cond_RPD: Any, *rest: Any) -> Any:
        rows.append(len(cond_RPD) // 2)  # with guidance
        return sample(cond_RPD, *rest)

    monkeypatch.setattr(model.pipe, "_block_sampler", counted)
    with running(model) as server:
        blocker = Hold(monkeypatch, model.pipe)
        asked = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "b", "steps": 3}, timeout=60))
        blocker.wait()
        stayer = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "a", "seed": 1}, timeout=60))
        until(lambda: server.queue.waiting == 1)
        job = "my-own-job"
        in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "deleted", "job": job}, timeout=60))
        until(lambda: server.queue.waiting == 2)
        leaver = sent(server.url, {"prompt": "left"})
        until(lambda: server.queue.waiting == 3)
        streamer = sent(server.url, {"prompt": "closed", "stream": True})
        until(lambda: server.queue.waiting == 4)
        # the second batch begins, and is held again after its first step
        second = Hold(monkeypatch, model.pipe)
        blocker.go()
        second.wait()
        assert server.queue.running == 4
        assert httpx.delete(f"{server.url}/v1/jobs/{job}").json()["status"] == "cancelled"
        streamer.close()
        leaver.close()
        tasks = list(server.queue._tasks.values())
        until(lambda: sum(task.status == "cancelled" for task in tasks) == 3, "three have left")
        second.go()
        assert pixels(stayer.result().json()["data"][0]["b64_json"]) == picture_of_a
        assert asked.result().status_code == 200 and sorted(set(second.cancelled)) == [1, 2, 3]
        assert rows[-4:] == [4, 1, 1, 1]  # the network works for one alone


def sent(url: str, fields: Any, length: int | None = None) -> socket.socket:
    """An open connection over which a request was sent; `length`: what it says of its content."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps(fields)
    head = f"POST {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    found = socket.create_connection((host, int(port)), timeout=60)
    found.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n{body}".encode())
    return found


def test_who_leaves_while_waiting_frees_the_place(model: ServedModel, monkeypatch: Any) -> None:
    hold = Hold(monkeypatch, model.pipe)
    with running(model, Limits(queue=1)) as server:
        first = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "x"}, timeout=60))
        hold.wait()
        with httpx.stream("POST", server.url + PATH, json={"prompt": "waits", "stream": True}, timeout=60):
            until(lambda: server.queue.waiting == 1)
            assert httpx.post(server.url + PATH, json={"prompt": "a"}).status_code == 429
        until(lambda: server.queue.waiting == 0)
        last = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "a"}, timeout=60))
        until(lambda: server.queue.waiting == 1)
        hold.go()
        assert first.result().status_code == last.result().status_code == 200 and hold.batches == [1, 1]


def test_a_full_queue_says_when_to_come_back_and_the_client_does(model: ServedModel, monkeypatch: Any) -> None:
    hold = Hold(monkeypatch, model.pipe)
    with running(model, Limits(queue=2)) as server:
        asked = [in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "x"}, timeout=60))]
        hold.wait()
        for place in (1, 2):
            asked.append(in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "x", "n": 4}, timeout=60)))
            until(lambda p=place: server.queue.waiting == p)
        answer = httpx.post(server.url + PATH, json={"prompt": "a"})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 120
        assert answer.headers["x-should-retry"] == "true" and answer.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            asker(server).images.generate(prompt="a")
        patient = in_background(lambda: asker(server, retries=2).images.generate(prompt="a"))
        time.sleep(0.3)
        hold.go()
        assert len(patient.result().data) == 1 and [one.result().status_code for one in asked] == [200] * 3


def test_the_event_loop_is_never_blocked(model: ServedModel, monkeypatch: Any) -> None:
    """While a batch is at work, others are answered."""
    hold = Hold(monkeypatch, model.pipe)
    with running(model) as server:
        asked = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "x", "job": "busy-job"}, timeout=60))
        hold.wait()
        assert httpx.get(f"{server.url}/health", timeout=5).json() == {"status": "ok", "waiting": 0, "running": 1}
        assert httpx.get(f"{server.url}/v1/jobs/busy-job", timeout=5).json()["status"] == "running"
        assert httpx.post(server.url + PATH, json={"prompt": 3}, timeout=5).status_code == 400
        hold.go()
        assert asked.result().status_code == 200


def test_a_job_can_be_fetched_after_its_client_left(model: ServedModel, picture_of_a: bytes, monkeypatch: Any) -> None:
    """Complaint (b) again: yet a closed tab must not lose the picture."""
    hold = Hold(monkeypatch, model.pipe)
    with running(model) as server:
        job = f"{server.url}/v1/jobs/tab-12345"
        fields = {"prompt": "a", "seed": 1, "job": "tab-12345"}
        with httpx.stream("POST", server.url + PATH, json={**fields, "stream": True}, timeout=60) as stream:
            assert stream.headers["x-job-id"] == "tab-12345"
            hold.wait()
            waits = httpx.stream("POST", server.url + PATH, json={"prompt": "b", "stream": True}, timeout=60)
            with waits as other:
                state = httpx.get(f"{server.url}/v1/jobs/{other.headers['x-job-id']}").json()
                assert state["status"] == "queued" and state["position"] == 0 and state["estimated_seconds"] >= 1
            until(lambda: server.queue.waiting == 0)  # it has left, so it is not begun when the first one ends
        hold.go()
        state = until(lambda: (found := httpx.get(job).json())["status"] == "done" and found)
        assert pixels(state["result"]["data"][0]["b64_json"]) == picture_of_a and state["progress"] == 1
        # the same request again is the same job, at once; another one under its name is refused
        again = httpx.post(server.url + PATH, json={**fields, "stream": True})
        assert "image_generation.completed" in again.text
        answer = httpx.post(server.url + PATH, json={**fields, "seed": 2})
        assert answer.status_code == 409 and answer.headers["x-should-retry"] == "false"
        assert httpx.delete(job).status_code == 200 and httpx.get(job).status_code == 404
        assert len(hold.batches) == 1


def test_a_cancelled_job_may_be_asked_for_again(model: ServedModel, picture_of_a: bytes, monkeypatch: Any) -> None:
    hold = Hold(monkeypatch, model.pipe)
    fields = {"prompt": "a", "seed": 1, "job": "again-and-again"}
    with client(model) as api:
        first = in_background(lambda: api.post(PATH, json=fields))
        hold.wait()
        assert api.delete("/v1/jobs/again-and-again").json()["status"] == "cancelled"
        answer = first.result()
        assert answer.status_code == 409 and answer.headers["x-should-retry"] == "false"
        hold.go()
        assert pixels(api.post(PATH, json=fields).json()["data"][0]["b64_json"]) == picture_of_a


def test_finished_jobs_are_kept_within_bounds(model: ServedModel) -> None:
    sizes: list[int] = []

    def after(limits: Limits) -> list[int]:
        with client(model, limits) as api:
            for number in range(4):
                assert api.post(PATH, json={"prompt": "a", "seed": 1, "job": f"number-{number}"}).status_code == 200
                sizes.append(api.app.state.queue.find(f"number-{number}").held_bytes if limits.kept_seconds else 0)
            return [number for number in range(4) if api.get(f"/v1/jobs/number-{number}").status_code == 200]

    assert after(Limits()) == [0, 1, 2, 3]
    assert after(Limits(kept_jobs=2)) == [2, 3]
    assert after(Limits(kept_seconds=0)) == []
    assert sizes[0] > 1000 and after(Limits(kept_bytes=2 * sizes[0])) == [2, 3]


def test_a_request_ends_at_the_time_limit(model: ServedModel, monkeypatch: Any) -> None:
    hold = Hold(monkeypatch, model.pipe)
    with running(model, Limits(seconds=0.5)) as server:
        one = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "x"}, timeout=60))
        hold.wait()
        two = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "waits", "stream": True}, timeout=60))
        answer = one.result()
        assert answer.status_code == 408 and answer.headers["x-should-retry"] == "false"
        assert json.loads(two.result().text.partition("data: ")[2])["error"]["code"] == "time_limit"
        hold.go()
        until(lambda: server.queue.running == 0)
        assert hold.batches == [1] and hold.steps == 1  # neither was finished for nobody, nor begun


def test_stopping_finishes_what_was_begun_and_refuses_the_rest(model: ServedModel, picture_of_a: bytes, monkeypatch: Any) -> None:
    hold = Hold(monkeypatch, model.pipe)
    with running(model) as server:
        begun = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "a", "seed": 1}, timeout=60))
        hold.wait()
        waiting = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "b"}, timeout=60))
        until(lambda: server.queue.waiting == 1)
        server.server.stop()
        refused = waiting.result()
        assert refused.status_code == 503 and refused.headers["x-should-retry"] == "true" and "retry-after" in refused.headers
        assert begun._found == []
        hold.go()
        assert pixels(begun.result().json()["data"][0]["b64_json"]) == picture_of_a
        server.thread.join(30)
        assert not server.thread.is_alive() and not server.queue.healthy


@pytest.mark.parametrize("signals", [1, 2])
def test_a_client_that_does_not_read_holds_no_stop_up(model: ServedModel, monkeypatch: Any, signals: int) -> None:
    """It asks for much, reads nothing, and stays: the server hangs up once no request could be at work any more, or when it is
    told again."""
    monkeypatch.setattr("bitdance.serve.server.GRACE", 0)
    count = re.compile(rb'bitdance_requests_total\{route="other",status="200"\} (\d+)')

    def stuck() -> bool:
        before = count.findall(server.queue.metrics.text())
        time.sleep(1)
        return bool(before) and count.findall(server.queue.metrics.text()) == before

    with running(model, Limits(seconds=1 if signals == 1 else 1000)) as server, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = server.url.removeprefix("http://").partition(":")
        deaf.connect((host, int(port)))
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 3000)
        until(stuck)
        for _ in range(signals):
            server.server.stop()
        server.thread.join(30)
        assert not server.thread.is_alive()


def test_a_second_signal_gives_up_what_was_begun(model: ServedModel, monkeypatch: Any) -> None:
    """Also a job that goes on when its client leaves."""
    hold = Hold(monkeypatch, model.pipe)
    with running(model) as server:
        asked = in_background(lambda: httpx.post(server.url + PATH, json={"prompt": "a", "job": "kept-job"}, timeout=60))
        hold.wait()
        server.server.stop()
        assert asked._found == []
        server.server.stop()
        assert asked.result().status_code == 503
        hold.go()
        server.thread.join(30)
        assert not server.thread.is_alive() and hold.steps == 1
        assert server.server.last_words == "what was begun is given up, what waited was refused"


def test_a_slow_sender_is_cut_off(model: ServedModel) -> None:
    with running(model, Limits(body_seconds=0.2)) as server, sent(server.url, {"prompt": "a"}, length=100) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_many_clients_at_once_lose_nothing(model: ServedModel, monkeypatch: Any) -> None:
    """Mixed sizes, bad requests, clients that leave; every other one gets its own picture."""
    wanted = {seed: np.asarray(model.pipe("a", seed=seed).images[0]).tobytes() for seed in range(4)}

    async def ask(sender: httpx.AsyncClient, url: str, number: int) -> str:
        fields: dict[str, Any] = {"prompt": "a", "seed": number % 4, "steps": 2}
        if number % 5 == 1:
            fields["size"] = "16x16"
        if number % 7 == 2:
            return str((await sender.post(url, json={**fields, "n": 99})).status_code)
        if number % 7 == 3:
            async with sender.stream("POST", url, json={**fields, "stream": True}):
                return "left"
        answer = await sender.post(url, json=fields)
        found = pixels(answer.json()["data"][0]["b64_json"])
        return "right" if number % 5 == 1 or found == wanted[number % 4] else "wrong"

    async def all_of_them(url: str) -> list[str]:
        async with httpx.AsyncClient(timeout=60) as sender:
            return await asyncio.gather(*(ask(sender, url, number) for number in range(40)))

    with running(model) as server:
        found = asyncio.run(all_of_them(server.url + PATH))
        assert sorted(set(found)) == ["400", "left", "right"] and found.count("right") == 28
        until(lambda: server.queue.running == 0 and server.queue.waiting == 0)
        assert threading.active_count() < 40


@pytest.mark.slow
def test_the_command_serves_and_sigterm_ends_it(model: ServedModel) -> None:
    """A process: the address once it is ready, pictures, exit code 143."""
    command = [sys.executable, "-m", "bitdance", "serve", "--model", str(model._folder), "--port", "0", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            url = process.stdout.readline().split()[-1]
            assert url.startswith("http://127.0.0.1:")
            answer = httpx.post(url + PATH, json={"prompt": "a"}, timeout=60)
            assert metadata_of(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
            assert process.stderr.read() == "bitdance: stopped: what was begun is finished, what waited was refused\n"
        finally:
            process.kill()


@pytest.mark.slow
def test_a_short_soak_keeps_every_promise(model: ServedModel, tmp_path: Path) -> None:
    """dev/soak.py, as docs/serve tells of it, with fewer requests: clients of every kind, a restart, nothing lost."""
    command = [sys.executable, str(ROOT / "dev" / "soak.py"), "--model", str(model._folder), "--sizes", "32x32", "16x16"]
    command += ["--steps", "10", "--requests", "60", "--restarts", "1", "--clients", "16", "--queue", "6"]
    command += ["--json", str(tmp_path / "soak.json")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["requests"] == 60 == sum(found["ends"].values()) and not found["broken"]
    assert found["pngs_equal_to_the_command_s"] > 10 and found["server"][-1]["server"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--queue", "0"], "--queue: queue = 0; a whole number from 1"),
        (["--port", "70000"], "--port: port = 70000"),
        (["--time-limit", "0"], "a number above 0"),
        (["--batch-size", "x"], "batch_size = 'x'"),
        (["--model", "nowhere"], "no model folder 'nowhere'"),
        (["--host", "192.0.2.1", "--port", "0"], "--host 192.0.2.1"),
        (["--host", "a..b", "--port", "0"], "--host a..b --port 0: "),
        (["--device", "tpu"], "tpu"),
        (["--cors", "https://a.example", "pages.example"], "--cors 'pages.example'; an origin is allowed"),
        (["--cors", "https://a.example/"], "--cors 'https://a.example/'"),
        (["--cors", "*"], "--cors '*'"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], words: str, capsys: Any) -> None:
    assert main(["serve", *flags]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and "Traceback" not in told


def test_a_port_that_is_taken_is_one_line(model: ServedModel, capsys: Any) -> None:
    with running(model) as server:
        port = server.url.rpartition(":")[2]
        assert main(["serve", "--port", port]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


def test_a_missing_extra_says_what_to_install(monkeypatch: Any, capsys: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest))
    assert main(["serve"]) == 2
    assert "serve needs uvicorn; install the extra: pip install 'bitdance[serve]'" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_key(monkeypatch: Any) -> Iterator[None]:
    monkeypatch.delenv("BITDANCE_API_KEY", raising=False)
    yield
