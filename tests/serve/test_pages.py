"""The documentation is that of what is answered."""

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from gdl_ray.family import Option
from serve import pages, requests
from serve.operations import OPERATIONS

DOCUMENT = pages.openapi()
BODIES = {row[0]: row[2] for row in pages._OPERATIONS}


def resolved(reference: str) -> Any:
    return DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]]


def test_every_operation_is_documented() -> None:
    documented = {path.rpartition("/")[2] for path in DOCUMENT["paths"] if path.count("/") == 4}
    assert documented == OPERATIONS.keys()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_examples_are_read(operation: str) -> None:
    content = DOCUMENT["paths"][f"/v1/models/{{name}}/{operation}"]["post"]["requestBody"]["content"]
    assert content["application/json"]["examples"]
    for example in content["application/json"]["examples"].values():
        requests.parse(BODIES[operation], json.dumps(example["value"]).encode())


def test_answers_have_the_documented_form(serve_family: Any, able: Any) -> None:
    """What the application answers, against the schema, by an independent validator."""
    client = serve_family(able).client
    one = [[[[0] * 4] * 4]]
    bodies: dict[str, Any] = {
        "sample": {"n": 2, "format": "json"},
        "complete": {"x": one, "known": [[[True] * 4] * 4], "format": "json"},
        "log_likelihood": {"x": one},
        "classify": {"x": one},
        "encode": {"x": one},
        "decode": {"z": [[0.0] * 16], "format": "json"},
        "interpolate": {"x": one * 2, "format": "json"},
    }
    for operation, body in bodies.items():
        answer = client.post(f"/{operation}", json=body)
        assert answer.status_code == 200, answer.text
        conforms(f"/v1/models/{{name}}/{operation}", "post", answer)
    conforms("/v1/models/{name}", "get", client.get(""))
    conforms("/v1/models", "get", client.get("http://server/v1/models"))
    conforms("/readyz", "get", client.get("http://server/readyz"))
    for wrong in (client.post("/sample", json={"n": 0}), client.get("http://server/v1/models/nope")):
        schema = resolved("ProblemDocument")
        jsonschema.validate(wrong.json(), {**schema, "components": DOCUMENT["components"]})


def conforms(path: str, method: str, answer: Any) -> None:
    content = DOCUMENT["paths"][path][method]["responses"]["200"]["content"]
    schema = content["application/json"]["schema"]
    jsonschema.validate(answer.json(), {**schema, "components": DOCUMENT["components"]})


def test_an_option_of_a_card_is_that_of_the_contract() -> None:
    assert set(pages.OptionCard.model_fields) == set(Option.__dataclass_fields__)
