"""A model's application, over a real engine and without Ray."""

import asyncio
import io
import json
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.types import Message

from gdl_ray.engine import Engine, request_keys
from gdl_ray.families import FAMILIES, build
from serve.model import MAX_LIKELIHOODS, Model


def draw(served: Any, body: Any = None, **headers: str) -> Any:
    content = body if isinstance(body, (str, bytes)) else json.dumps(body or {})
    return served.client.post("/sample", content=content, headers=headers)


def array(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def test_samples_are_those_of_the_family_and_name_their_origin(serve_family: Any, explicit: Any) -> None:
    response = draw(serve_family(explicit), {"n": 5, "seed": 7, "label": 3, "format": "npy"})
    expected = explicit.sample(request_keys(7, 5), torch.full((5,), 3)).numpy()
    np.testing.assert_array_equal(array(response), expected)
    origin = {name: response.headers[name] for name in ("x-model", "x-version", "x-seed", "x-n", "x-label")}
    assert list(origin.values()) == ["toy-fake", "3", "7", "5", "3"]


def test_options_are_those_of_the_model_and_are_told(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    response = draw(served, {"n": 2, "seed": 7, "shade": 5, "format": "npy"})
    assert array(response)[:, 0, -1, -1].tolist() == [5, 5]
    assert response.headers["x-shade"] == "5.0"
    assert array(draw(served, {"n": 2, "format": "npy"}))[:, 0, -1, -1].tolist() == [0, 0]
    card = served.client.get("/").json()
    assert card["capabilities"] == ["likelihood"]
    assert card["options"]["shade"] == {
        "default": 0,
        "least": 0,
        "most": 16,
        "meaning": "Value of the last.",
        "whole": True,
    }


def test_a_request_without_seed_is_told_the_one_it_got(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    first, second = (draw(served, {"n": 4, "format": "npy"}) for _ in range(2))
    assert first.headers["x-seed"] != second.headers["x-seed"]
    again = draw(served, {"n": 4, "format": "npy", "seed": int(first.headers["x-seed"])})
    assert again.content == first.content


def test_encodings_agree(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    by_format = {
        name: draw(served, {"n": 3, "seed": 1, "format": name}) for name in ("npy", "npz", "json", "png")
    }
    samples = array(by_format["npy"])
    assert samples.shape == (3, 1, 4, 4)
    assert samples.dtype == np.uint8
    bundle = array(by_format["npz"])
    np.testing.assert_array_equal(bundle["samples"], samples)
    assert (bundle["model"], bundle["version"], bundle["seed"]) == ("toy-fake", 3, 1)
    document = by_format["json"].json()
    assert document.pop("samples") == samples.tolist()
    assert document == {"model": "toy-fake", "version": 3, "seed": 1, "n": 3, "label": None, "shade": 0.0}
    assert by_format["png"].headers["content-type"] == "image/png"
    picture = np.asarray(Image.open(io.BytesIO(by_format["png"].content)))
    zoom = picture.shape[0] // 9  # two rows of four pixels and a gap
    corner = picture[: 4 * zoom : zoom, : 4 * zoom : zoom]
    np.testing.assert_array_equal(corner, np.rint(samples[0, 0].astype(float) * 255 / 16))


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "image/png"),
        ("application/json, image/png", "application/json"),
        ("text/html, application/x-npy;q=0.9", "application/x-npy"),
    ],
)
def test_the_format_follows_the_accept_header(
    serve_family: Any, explicit: Any, accept: str, media_type: str
) -> None:
    assert draw(serve_family(explicit), accept=accept).headers["content-type"] == media_type


def test_a_body_is_json_whatever_it_is_declared_to_be(serve_family: Any, explicit: Any) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    response = draw(serve_family(explicit), '{"n": 2, "format": "npy"}', **form)
    assert len(array(response)) == 2


def test_tokens_are_served_but_not_drawn(serve_family: Any, tokens: Any) -> None:
    served = serve_family(tokens)
    samples = array(draw(served, {"n": 2}))
    assert samples.shape == (2, 6)
    assert samples.dtype == np.int64
    assert draw(served, {"format": "png"}).json()["errors"][0]["field"] == "format"
    assert "no classes" in draw(served, {"label": 0}).json()["detail"]


@pytest.mark.parametrize(
    ("body", "field", "value", "cure"),
    [
        ({"n": 0}, "n", "0", "greater than or equal to 1"),
        ({"n": 10**9}, "n", "1000000000", "less than or equal to 1024"),
        ({"n": "3"}, "n", "3", "valid integer"),
        ({"n": True}, "n", "true", "valid integer"),
        ({"seed": "x"}, "seed", "x", "valid integer"),
        ({"seed": -1}, "seed", "-1", "greater than or equal to 0"),
        ({"seed": 2**53}, "seed", str(2**53), "less than or equal"),
        ({"label": 99}, "label", "99", "from 0 to 9"),
        ({"format": "gif"}, "format", "gif", "'png', 'npy', 'npz' or 'json'"),
        ({"steps": 5}, "steps", "5", "this model knows n, seed, label, format, shade"),
        ({"steps": "x"}, "steps", "x", "valid number"),
        ({"shade": 17}, "shade", "17", "must be an integer from 0 to 16"),
        ({"shade": 0.5}, "shade", "0.5", "must be an integer from 0 to 16"),
        ('{"shade": NaN}', "shade", "nan", "must be an integer"),
        ("[1]", "body", "[1]", "object"),
        ('{"n": ', "body", '{"n": ', "Invalid JSON"),
        (b"\xff\xfe", "body", "\ufffd\ufffd", "Invalid JSON"),
        ('{"seed": ' + "9" * 6000 + "}", "body", "...", "out of range"),
        ("[" * 5000, "body", "...", "recursion limit"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_cure(
    serve_family: Any, explicit: Any, body: Any, field: str, value: str, cure: str
) -> None:
    response = draw(serve_family(explicit), body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == 422
    (error,) = document["errors"]
    assert error["field"] == field
    assert value in error["value"]
    assert cure in error["cure"]
    assert len(response.content) < 1000


def test_a_long_body_is_refused(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    assert draw(served, b" " * 10**7).status_code == 413
    assert draw(served, b"{" + b" " * 10**6 + b"}").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/sample", 405),
        ("POST", "", 405),
        ("DELETE", "/log_likelihood", 405),
        ("POST", "/paint", 404),
    ],
)
def test_wrong_methods_and_paths_are_problems(
    serve_family: Any, explicit: Any, method: str, path: str, status: int
) -> None:
    response = serve_family(explicit).client.request(method, path)
    assert response.status_code == status
    assert response.json()["status"] == status
    assert ("allow" in response.headers) == (status == 405)


def test_a_full_queue_says_when_to_come_back(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit, queue_samples=10)
    response = draw(served, {"n": 11})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


def test_a_broken_sampler_shows_no_stack_trace(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    explicit.gate.wait = lambda timeout: 1 / 0
    response = draw(served)
    assert response.status_code == 500
    assert response.json()["type"] == "urn:gdl-ray:problem:server-error"
    assert "Traceback" not in response.text
    assert "ZeroDivision" not in response.text


def test_before_the_first_version_is_loaded_it_says_so(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    model, served.app.model = served.app.model, None
    served.app.failure = "version 1 could not be loaded: it is damaged"
    response = draw(served)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert "it is damaged" in response.json()["detail"]
    served.app.model = model


def test_a_version_that_takes_over_while_the_body_arrives_answers(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    old, messages = served.app.model, []

    async def receive() -> Message:
        served.app.model = Model("toy-fake", 4, explicit, Engine(explicit, slots=8))
        old.engine.close(drain=True)
        return {"type": "http.request", "body": b'{"n": 2}', "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": "/sample", "root_path": "", "headers": []}
    asyncio.run(served.app(scope, receive, send))
    assert messages[0]["status"] == 200
    assert (b"x-version", b"4") in messages[0]["headers"]


def test_the_samples_of_a_client_that_left_are_given_up(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    engine = served.app.model.engine
    explicit.gate.clear()

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"n": 40}', "more_body": False}

    async def send(message: Message) -> None:
        raise AssertionError("nobody listens")

    async def leave() -> None:
        scope = {"type": "http", "method": "POST", "path": "/sample", "root_path": "", "headers": []}
        request = asyncio.create_task(served.app(scope, receive, send))
        while engine.load.waiting != 32:
            await asyncio.sleep(0.01)
        request.cancel()  # what Serve does when the connection closes
        await asyncio.wait([request])

    asyncio.run(leave())
    assert engine.load.waiting == 0
    explicit.gate.set()
    deadline = time.monotonic() + 10
    while engine.load.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.load.active == 0


def test_the_card_tells_what_may_be_asked(serve_family: Any, explicit: Any, implicit: Any) -> None:
    card = serve_family(explicit).client.get("").json()
    assert (card["name"], card["version"], card["family"]) == ("toy-fake", 3, "explicit")
    assert card["density"] == "tractable"
    assert (card["likelihood"], card["operations"]) == ("exact", ["sample", "log_likelihood"])
    assert card["data"] == explicit.spec.to_json()
    card = serve_family(implicit).client.get("/").json()
    assert (card["likelihood"], card["operations"]) == (None, ["sample"])


def likelihood(served: Any, **body: Any) -> Any:
    return served.client.post("/log_likelihood", json=body)


def test_log_likelihood_is_that_of_the_family(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    x = np.arange(32).reshape(2, 1, 4, 4) % 17
    answer = likelihood(served, x=x.tolist(), labels=[4, 8], samples=2).json()
    expected = -x.sum((1, 2, 3)) - np.array([2.0, 4.0])
    assert answer["nats"] == expected.tolist()
    np.testing.assert_allclose(answer["bits_per_dim"], -expected / 16 / np.log(2))
    assert (answer["kind"], answer["version"], answer["samples"]) == ("exact", 3, 2)
    unlabelled = likelihood(served, x=x.tolist()).json()
    assert unlabelled["nats"] == (-x.sum((1, 2, 3)) + 1.0).tolist()  # the label -1


def test_many_examples_are_computed_in_parts(serve_family: Any, explicit: Any) -> None:
    x = np.random.default_rng(0).integers(17, size=(600, 1, 4, 4))
    labels = np.arange(600) % 10
    nats = likelihood(serve_family(explicit), x=x.tolist(), labels=labels.tolist()).json()["nats"]
    assert nats == (-x.sum((1, 2, 3)) - labels).tolist()


def test_a_bound_on_samples_does_not_depend_on_their_seed(serve_family: Any, explicit: Any) -> None:
    vae = build("vae", FAMILIES["vae"].Config(latent=4, width=4, hidden=32), explicit.spec).eval()
    with torch.no_grad():  # the posterior is the prior, and what is drawn from either decides the pixels
        vae.get_parameter("to_posterior.weight").zero_()
        vae.get_parameter("to_posterior.bias").zero_()
        vae.get_parameter("from_latent.weight").mul_(30)
    served = serve_family(vae)
    x = array(draw(served, {"n": 600, "seed": 7, "format": "npy"})).tolist()
    same, other = (np.array(likelihood(served, x=x, seed=seed).json()["nats"]) for seed in (7, 8))
    gap = same - other
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap))


def test_only_requests_that_have_arrived_hold_a_place_among_likelihoods(
    serve_family: Any, explicit: Any
) -> None:
    served = serve_family(explicit)

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def arrived() -> Message:
        return {"type": "http.request", "body": json.dumps({"x": ONE}).encode(), "more_body": False}

    async def ask(receive: Any) -> int:
        statuses: list[int] = []

        async def send(message: Message) -> None:
            statuses.append(message.get("status", 0))

        scope = {"type": "http", "method": "POST", "path": "/log_likelihood", "root_path": "", "headers": []}
        await served.app(scope, receive, send)
        return statuses[0]

    async def crowd() -> list[int]:
        slow = [asyncio.create_task(ask(never)) for _ in range(MAX_LIKELIHOODS)]
        await asyncio.sleep(0)
        statuses = await asyncio.gather(*(ask(arrived) for _ in range(MAX_LIKELIHOODS + 1)))
        for task in slow:
            task.cancel()
        return statuses

    assert sorted(asyncio.run(crowd())) == [200] * MAX_LIKELIHOODS + [429]


def test_tokens_have_a_likelihood_too(serve_family: Any, tokens: Any) -> None:
    assert likelihood(serve_family(tokens), x=[[299, 0, 0, 0, 0, 0]]).json()["nats"] == [-298.0]


ONE = np.zeros((1, 1, 4, 4), int).tolist()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "x"),
        ({"x": []}, "x"),
        ({"x": [[1, 2], [3]]}, "x"),
        ({"x": [[[[1, 2], [3, 4]]]]}, "x"),
        ({"x": (np.zeros((1, 1, 4, 4)) + 0.5).tolist()}, "x"),
        ({"x": (np.zeros((1, 1, 4, 4), int) + 17).tolist()}, "x"),
        ({"x": (np.zeros((1, 1, 4, 4), int) - 1).tolist()}, "x"),
        ({"x": [[[[10**30] * 4] * 4]]}, "x"),
        ({"x": [None]}, "x"),
        ({"x": ["1"]}, "x"),
        ({"x": ONE, "labels": [10]}, "labels"),
        ({"x": ONE, "labels": [1, 2]}, "labels"),
        ({"x": ONE, "labels": []}, "labels"),
        ({"x": ONE, "samples": 0}, "samples"),
        ({"x": ONE * 100, "samples": 1000}, "samples"),
    ],
)
def test_wrong_examples_are_refused(serve_family: Any, explicit: Any, body: Any, field: str) -> None:
    response = likelihood(serve_family(explicit), **body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field


def test_an_implicit_model_has_no_likelihood(serve_family: Any, implicit: Any) -> None:
    response = likelihood(serve_family(implicit), x=ONE)
    assert response.status_code == 409
    assert "gives no likelihood" in response.json()["detail"]
