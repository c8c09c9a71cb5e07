"""A replica's application, over real engines and without Ray."""

import asyncio
import base64
import dataclasses
import io
import json
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.types import Message
from torch import Tensor

from gdl_ray.engine import request_keys, seeds_of
from gdl_ray.families import FAMILIES, build
from gdl_ray.family import Batch
from serve import app
from serve.encoding import Samples
from serve.keys import add, read_records
from serve.operations import MAX_HELD
from tests.serve.conftest import Explicit, directory, followed


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
    names = ("npy", "npz", "json", "png", "zip")
    by_format = {name: draw(served, {"n": 3, "seed": 1, "label": 2, "format": name}) for name in names}
    samples = array(by_format["npy"])
    assert samples.shape == (3, 1, 4, 4)
    assert samples.dtype == np.uint8
    bundle = array(by_format["npz"])
    np.testing.assert_array_equal(bundle["samples"], samples)
    assert (bundle["model"], bundle["version"], bundle["seed"]) == ("toy-fake", 3, 1)
    assert bundle["labels"].tolist() == [2, 2, 2]
    document = by_format["json"].json()
    assert document.pop("samples") == samples.tolist()
    assert document.pop("seeds") == bundle["seeds"].tolist() == seeds_of(1, 3).tolist()
    origin = {"model": "toy-fake", "version": 3, "seed": 1, "n": 3, "labels": [2, 2, 2]}
    assert document == {**origin, "options": {"shade": 0.0}}
    assert by_format["png"].headers["content-type"] == "image/png"
    picture = np.asarray(Image.open(io.BytesIO(by_format["png"].content)))
    zoom = picture.shape[0] // 9  # two rows of four pixels and a gap
    corner = picture[: 4 * zoom : zoom, : 4 * zoom : zoom]
    shades = np.rint(samples[:, 0].astype(float) * 255 / 16)
    np.testing.assert_array_equal(corner, shades[0])
    archive = zipfile.ZipFile(io.BytesIO(by_format["zip"].content))
    for name, image in zip(("0000.png", "0001.png", "0002.png"), shades, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(archive.open(name))), image)
    assert json.loads(archive.read("samples.json"))["labels"] == [2, 2, 2]


def test_each_sample_can_be_made_again_by_its_seed(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    body = {"seed": 7, "labels": [1, 2, 3, 4], "shade": 5, "format": "json"}
    first = draw(served, body).json()
    again = {"seeds": first["seeds"][2:], "labels": first["labels"][2:], **first["options"]}
    samples = draw(served, {**again, "format": "json"}).json()
    assert samples["samples"] == first["samples"][2:]
    assert samples["seed"] is None


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"seeds": [1, 2], "n": 3}, "one for each of the 3"),
        ({"labels": [1, 2], "seeds": [1]}, "one for each of the 1"),
        ({"labels": [1], "label": 1}, "not both"),
        ({"seeds": [1], "seed": 1}, "not both"),
        ({"labels": [1, 10]}, "from 0 to 9"),
        ({"seeds": []}, "at least 1"),
        ({"seeds": [2**53]}, "less than or equal"),
        ({"timeout_s": 0}, "greater than or equal to 0.1"),
        ({"timeout_s": 601}, "less than or equal to 600"),
        ({"stream": 1}, "boolean"),
    ],
)
def test_fields_that_contradict_each_other_are_told(
    serve_family: Any, explicit: Any, body: Any, told: str
) -> None:
    response = draw(serve_family(explicit), body)
    assert response.status_code == 422
    assert told in response.json()["detail"]


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
        ({"format": "gif"}, "format", "gif", "'png', 'npy', 'npz', 'json' or 'zip'"),
        (
            {"steps": 5},
            "steps",
            "5",
            "this model knows timeout_s, seed, seeds, label, format, stream, n, labels, shade",
        ),
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


def test_versions_and_aliases_are_named_behind_the_model(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    url = "http://server/v1/models/toy-fake"
    for reference, version in [("", "3"), ("@champion", "3"), ("@old", "1"), ("@2", "2")]:
        answer = served.client.post(f"{url}{reference}/sample", json={"n": 1})
        assert answer.headers["x-version"] == version
    refused = served.client.post(f"{url}@best/sample", json={"n": 1})
    assert refused.status_code == 404
    assert "its aliases are: toy-fake@champion, toy-fake@old" in refused.json()["detail"]


def test_an_unknown_model_is_told_from_the_known(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    for method, path in [("GET", "nope"), ("POST", "nope/sample"), ("POST", "nope@2/classify")]:
        response = served.client.request(method, f"http://server/v1/models/{path}", content=b"{ not json")
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert "'nope': there are toy-fake" in response.json()["detail"]


def test_a_version_that_cannot_be_loaded_says_why(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    for _ in range(2):  # the second time, nothing is tried
        response = served.client.post("http://server/v1/models/toy-fake@9/sample", json={})
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert "it is damaged" in response.json()["detail"]


def test_the_registry_is_listed(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    answer = served.client.get("http://server/v1/models").json()
    (model,) = answer["models"]
    assert (model["name"], model["champion"], model["path"]) == ("toy-fake", 3, "/v1/models/toy-fake")
    assert answer["registry_failure"] is None
    asyncio.run(followed(served.shelf, directory(failure="MLflow does not answer")))
    answer = served.client.get("http://server/v1/models").json()
    assert answer["registry_failure"] == "MLflow does not answer"


def test_readiness_is_to_know_the_registry(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    for path in ("healthz", "readyz"):
        assert served.client.get(f"http://server/{path}").json() == {"status": "ok"}
    served.shelf.directory = directory(serial=0, failure="MLflow does not answer")
    assert served.client.get("http://server/healthz").status_code == 200
    response = served.client.get("http://server/readyz")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert "MLflow does not answer" in response.json()["detail"]


def test_the_documentation_is_served(serve_family: Any, explicit: Any) -> None:
    client = serve_family(explicit).client
    assert "swagger" in client.get("http://server/docs").text
    assert client.get("http://server/openapi.json").json()["openapi"] == "3.1.0"


def scope(path: str = "/v1/models/toy-fake/sample") -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}


def test_a_version_that_takes_over_while_the_body_arrives_answers(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    messages = []

    async def receive() -> Message:
        await followed(served.shelf, directory(4))
        return {"type": "http.request", "body": b'{"n": 2}', "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(served.app(scope(), receive, send))
    assert messages[0]["status"] == 200
    assert (b"x-version", b"4") in messages[0]["headers"]


def test_the_samples_of_a_client_that_left_are_given_up(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    engine = served.engine
    explicit.gate.clear()

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"n": 40}', "more_body": False}

    async def send(message: Message) -> None:
        raise AssertionError("nobody listens")

    async def leave() -> None:
        request = asyncio.create_task(served.app(scope(), receive, send))
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


def test_the_card_tells_what_may_be_asked(serve_family: Any, able: Any, implicit: Any) -> None:
    card = serve_family(able).client.get("").json()
    assert (card["name"], card["version"], card["family"]) == ("toy-fake", 3, "able")
    assert (card["density"], card["likelihood"]) == ("tractable", "exact")
    all_of_them = ["sample", "complete", "log_likelihood", "classify", "encode", "decode", "interpolate"]
    assert card["operations"] == all_of_them
    assert card["data"] == able.spec.to_json()
    assert card["aliases"] == {"champion": 3, "old": 1}
    assert card["load"]["sample"]["slots"] == 8
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

        await served.app(scope("/v1/models/toy-fake/log_likelihood"), receive, send)
        return statuses[0]

    async def crowd() -> list[int]:
        slow = [asyncio.create_task(ask(never)) for _ in range(MAX_HELD)]
        await asyncio.sleep(0)
        statuses = await asyncio.gather(*(ask(arrived) for _ in range(MAX_HELD + 1)))
        for task in slow:
            task.cancel()
        return statuses

    assert sorted(asyncio.run(crowd())) == [200] * MAX_HELD + [429]


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


@pytest.mark.parametrize("operation", ["log_likelihood", "classify", "encode", "complete", "interpolate"])
def test_a_model_that_is_not_able_says_what_it_can(serve_family: Any, implicit: Any, operation: str) -> None:
    response = serve_family(implicit).client.post(f"/{operation}", json={"x": ONE})
    assert response.status_code == 409
    assert "it can: sample." in response.json()["detail"]


def test_classes_are_found_by_bayes_rule(serve_family: Any, able: Any) -> None:
    """Of the toy, log p(x | y) = -y + a constant."""
    answer = serve_family(able).client.post("/classify", json={"x": ONE * 3}).json()
    expected = np.exp(-np.arange(10.0)) / np.exp(-np.arange(10.0)).sum()
    np.testing.assert_allclose(answer["probabilities"], [expected] * 3, rtol=1e-5)
    assert answer["labels"] == [0, 0, 0]


def test_what_is_encoded_is_decoded(serve_family: Any, able: Any) -> None:
    client = serve_family(able).client
    x = np.arange(32).reshape(2, 1, 4, 4) % 17
    z = client.post("/encode", json={"x": x.tolist(), "labels": [1, 2]}).json()["z"]
    assert z == x.reshape(2, 16).tolist()
    decoded = array(client.post("/decode", json={"z": z, "format": "npy"}))
    np.testing.assert_array_equal(decoded, x)
    refused = client.post("/decode", json={"z": [[1.0, 2.0]]})
    assert refused.json()["detail"] == "z=2 numbers each: Give 16"
    latents: list[Any] = [[["a"]], [1.0], [[1e39] * 16], [[]]]
    for wrong in latents:
        assert client.post("/decode", json={"z": wrong}).status_code == 422


def test_the_way_between_two_examples_starts_and_ends_there(serve_family: Any, able: Any) -> None:
    client = serve_family(able).client
    x = np.arange(32).reshape(2, 1, 4, 4) % 17
    way = array(client.post("/interpolate", json={"x": x.tolist(), "steps": 5, "format": "npy"}))
    np.testing.assert_array_equal(way[[0, -1]], x)
    assert len({image.tobytes() for image in way}) == 5
    same = array(
        client.post("/interpolate", json={"z": x.reshape(2, 16).tolist(), "steps": 5, "format": "npy"})
    )
    np.testing.assert_array_equal(way, same)
    for wrong in ({}, {"x": x.tolist(), "z": [[0.0] * 16] * 2}, {"x": x[:1].tolist()}):
        assert "two examples" in client.post("/interpolate", json=wrong).json()["detail"]


def test_completions_keep_what_is_known(serve_family: Any, able: Any) -> None:
    served = serve_family(able)
    x = np.arange(32).reshape(2, 1, 4, 4) % 17
    known = np.zeros((1, 4, 4), bool)
    known[:, :2] = True
    body = {"x": x.tolist(), "known": known.tolist(), "n": 3, "seed": 7, "format": "npy", "shade": 4}
    drawn = array(served.client.post("/complete", json=body))
    assert drawn.shape == (6, 1, 4, 4)
    np.testing.assert_array_equal(drawn[:, :, :2], x.repeat(3, 0)[:, :, :2])
    assert (drawn[:, 0, -1, -1] == 4).all()
    assert len({image.tobytes() for image in drawn}) == 6
    nothing = [[[[None] * 4] * 4]] * 2  # unknown values are not read
    blank = {**body, "x": nothing, "known": np.zeros((1, 4, 4), bool).tolist()}
    samples = array(draw(served, {"seed": 7, "n": 6, "format": "npy", "shade": 4}))
    np.testing.assert_array_equal(array(served.client.post("/complete", json=blank)), samples)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"x": ONE}, "known"),
        ({"x": ONE, "known": [[[1] * 4] * 4]}, "known"),
        ({"x": ONE, "known": [[True]]}, "known"),
        ({"x": ONE, "known": [[[[True] * 4] * 4]] * 2}, "known"),
        ({"x": [[[[None] * 4] * 4]], "known": [[[True] * 4] * 4]}, "x"),
        ({"x": ONE, "known": [[[True] * 4] * 4], "n": 1025}, "n"),
        ({"x": ONE * 600, "known": [[[True] * 4] * 4], "n": 2}, "n"),
        ({"x": ONE, "known": [[[True] * 4] * 4], "n": 2, "seeds": [1]}, "seeds"),
        ({"x": ONE, "known": [[[True] * 4] * 4], "paint": 1}, "paint"),
    ],
)
def test_wrong_completions_are_refused(serve_family: Any, able: Any, body: Any, field: str) -> None:
    response = serve_family(able).client.post("/complete", json=body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field


def events(response: Any) -> list[tuple[str, Any]]:
    """Read server-sent events."""
    told = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        told.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return told


def test_a_stream_shows_samples_as_they_form(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    response = draw(served, {"n": 20, "seed": 7, "stream": True, "format": "npy"})
    assert response.headers["content-type"].startswith("text/event-stream")
    *previews, (last, told) = events(response)
    assert {name for name, _ in previews} == {"preview"}
    shares = [preview["share"] for _, preview in previews]
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] < 1
    assert all(base64.b64decode(preview["png"]).startswith(b"\x89PNG") for _, preview in previews)
    assert last == "samples"
    content = base64.b64decode(told.pop("content"))
    assert content == draw(served, {"n": 20, "seed": 7, "format": "npy"}).content
    assert (told["media_type"], told["version"], told["seeds"]) == (
        "application/x-npy",
        3,
        seeds_of(7, 20).tolist(),
    )


def test_a_deadline_ends_a_request_and_frees_its_slots(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    explicit.gate.clear()
    response = draw(served, {"n": 40, "timeout_s": 0.2})
    assert response.status_code == 504
    assert "after 0.2 s" in response.json()["detail"]
    ((name, problem),) = events(draw(served, {"n": 40, "timeout_s": 0.2, "stream": True}))
    assert (name, problem["status"]) == ("problem", 504)
    explicit.gate.set()
    assert len(array(draw(served, {"n": 3, "format": "npy"}))) == 3
    assert served.engine.load.active + served.engine.load.waiting == 0


def test_keys_are_asked_for_where_they_are_required(serve_family: Any, explicit: Any, tmp_path: Path) -> None:
    served = serve_family(explicit, required=True)
    secret, _ = add(tmp_path / "keys.json", "ada", ["sample"], samples_per_minute=10)
    served.keyring.update(read_records(tmp_path / "keys.json"))
    assert draw(served, {"n": 2}).status_code == 401
    bearer = {"authorization": f"Bearer {secret}"}
    assert draw(served, {"n": 10}, **bearer).status_code == 200
    limited = draw(served, {"n": 5}, **bearer)
    assert (limited.status_code, limited.json()["type"]) == (429, "urn:gdl-ray:problem:rate-limit")
    assert 25 <= int(limited.headers["retry-after"]) <= 30
    assert served.client.get("", headers=bearer).status_code == 403  # its scope is another
    assert served.client.get("http://server/healthz").status_code == 200


def test_who_sampled_what_is_written_down(serve_family: Any, explicit: Any, tmp_path: Path) -> None:
    served = serve_family(explicit)
    draw(served, {"n": 2, "seed": 7}, **{"x-request-id": "abc-1"})
    draw(served, {"n": 0})
    served.app._audit._waiting.join()
    (file,) = served.audit.glob("*")
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["request_id"], first["operation"], first["model"]) == ("abc-1", "sample", "toy-fake")
    assert (first["version"], first["n"], first["seed"], first["status"]) == (3, 2, 7, 200)
    assert (second["status"], second["problem"]) == (422, "invalid-request")


def test_the_registry_may_tell_of_its_events(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    forged = served.client.post("http://server/hooks/registry", json={})
    assert (forged.status_code, served.refreshed) == (401, 0)


def test_a_body_that_does_not_end_is_not_waited_for(
    serve_family: Any, explicit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.1)
    served, messages = serve_family(explicit), []

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(served.app(scope(), never, send))
    assert messages[0]["status"] == 408


def test_a_word_of_a_client_names_no_operation(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    assert served.client.get("/evil-1").status_code == 404
    served.app._audit._waiting.join()
    (file,) = served.audit.glob("*")
    assert json.loads(file.read_text())["operation"] == "unknown"


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("sample", {f"f{i}": 0 for i in range(60_000)}),
        ("encode", {"x": [0], "labels": [""] * 100_000}),
        ("sample", {"seeds": [-1] * 1000}),
        ("sample", {"x" * 100_000: "a"}),
    ],
)
def test_a_flood_of_errors_is_told_in_short(serve_family: Any, able: Any, operation: str, body: Any) -> None:
    response = serve_family(able).client.post(f"/{operation}", json=body)
    assert response.status_code == 422
    assert len(response.content) < 10_000


class Impossible(Explicit):
    """Gives -infinity."""

    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        return torch.full((len(batch.x),), -torch.inf)


def test_what_json_has_no_number_for_is_null(serve_family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "impossible", Impossible)
    served = serve_family(Impossible())
    assert served.client.post("/log_likelihood", json={"x": ONE}).json()["nats"] == [None]
    known = directory()
    entry = dataclasses.replace(known.entries["toy-fake"], description={"metrics": {"test/loss": math.nan}})
    asyncio.run(followed(served.shelf, directory(entries={"toy-fake": entry})))
    for url in ("", "http://server/v1/models"):
        assert '"test/loss":null' in served.client.get(url).text


def test_completions_of_anything_but_numbers_are_refused(serve_family: Any, able: Any) -> None:
    body = {"x": [[[["a"] * 4] * 4]], "known": [[[True] * 4] * 4]}
    assert serve_family(able).client.post("/complete", json=body).status_code == 422


def test_who_is_refused_is_not_charged(serve_family: Any, explicit: Any, tmp_path: Path) -> None:
    served = serve_family(explicit, queue_samples=8)
    secret, _ = add(tmp_path / "keys.json", "ada", samples_per_minute=100)
    served.keyring.update(read_records(tmp_path / "keys.json"))
    bearer = {"authorization": f"Bearer {secret}"}
    for _ in range(6):
        assert draw(served, {"n": 30}, **bearer).json()["type"] == "urn:gdl-ray:problem:queue-full"
    assert draw(served, {"n": 8}, **bearer).status_code == 200


def test_a_stream_that_nobody_hears_is_given_up(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    explicit.gate.clear()

    messages: list[Message] = [
        {"type": "http.request", "body": b'{"n": 40, "stream": true}', "more_body": False}
    ]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise OSError("nobody listens")

    asyncio.run(served.app(scope(), receive, send))
    assert served.engine.load.waiting == 0
    explicit.gate.set()
    served.app._audit._waiting.join()
    (file,) = served.audit.glob("*")
    assert json.loads(file.read_text())["problem"] == "client-gone"


def test_what_breaks_in_a_stream_is_told_in_it(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    explicit.gate.wait = lambda timeout: 1 / 0
    ((name, problem),) = events(draw(served, {"n": 2, "stream": True}))
    assert (name, problem["type"]) == ("problem", "urn:gdl-ray:problem:server-error")
    served.app._audit._waiting.join()
    (file,) = served.audit.glob("*")
    assert json.loads(file.read_text())["problem"] == "server-error"


def slowly(timeout: float) -> bool:
    """Let each step through a gate after a while."""
    time.sleep(0.05)
    return True


def test_only_the_first_preview_is_measured(serve_family: Any, explicit: Any) -> None:
    served = serve_family(explicit)
    seen: list[float] = []
    explicit.gate.wait = slowly
    served.app._meter.previewed = lambda model, seconds: seen.append(seconds)
    assert len(events(draw(served, {"n": 20, "stream": True}))) > 2
    assert len(seen) == 1


def test_a_name_that_headers_cannot_say_is_written_in_percents() -> None:
    samples = Samples(np.zeros((1, 1, 2, 2), np.uint8), "zahlen-ä雪", 1, 7, None, np.array([-1]), {})
    assert samples.headers["X-Model"] == "zahlen-%C3%A4%E9%9B%AA"


def test_before_the_registry_has_answered_no_key_is_called_wrong(
    serve_family: Any, explicit: Any, tmp_path: Path
) -> None:
    served = serve_family(explicit, required=True)
    served.shelf.directory = directory(serial=0, failure="MLflow does not answer")
    response = draw(served, {}, authorization="Bearer gdl_x")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")


def test_bodies_have_a_limit_together(
    serve_family: Any, explicit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_BODIES_BYTES", 1000)
    served = serve_family(explicit)
    assert draw(served, b" " * 1001).status_code == 429
    assert draw(served, {"n": 1}).status_code == 200
