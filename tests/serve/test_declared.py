"""The service as a file declares it, read by Ray Serve's own code."""

from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import BuiltApplication, build_app

from serve import declared, replica


def built(**args: Any) -> BuiltApplication:
    """Build the application as Serve does when it is given the file."""
    given = {"url": "http://gdl-ray:8000", **args}
    builder: Any = declared.application
    target = call_user_app_builder_with_args_if_necessary(builder, given)
    return build_app(target, name=replica.APPLICATION)


def settings(application: BuiltApplication) -> replica.Settings:
    """What its operator is told."""
    operator = next(each for each in application.deployments if each.name == replica.OPERATOR)
    told: replica.Settings = operator.init_args[0]
    return told


def test_it_is_the_pool_and_its_operator() -> None:
    application = built()
    assert application.ingress_deployment_name == "Replica"
    assert {each.name for each in application.deployments} == {"Replica", replica.OPERATOR}
    assert settings(application) == replica.Settings(url="http://gdl-ray:8000", require_keys=True)


def test_the_pool_is_as_the_file_says() -> None:
    application = built(replicas="1:4", gpus=0.25, models=3, cors_origins=["http://page"])
    pool = next(each for each in application.deployments if each.name == "Replica")
    scaling = pool._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert pool.ray_actor_options is not None
    assert pool.ray_actor_options["num_gpus"] == 0.25
    assert (settings(application).models, settings(application).cors_origins) == (3, ("http://page",))


def test_a_number_of_replicas_needs_no_quotes() -> None:
    pool = next(each for each in built(replicas=2).deployments if each.name == "Replica")
    assert pool.num_replicas == 2


@pytest.mark.parametrize(
    "args",
    [
        {"replica": 2},
        {"replicas": 0},
        {"replicas": "0:2"},
        {"replicas": "many"},
        {"gpus": -1},
        {"models": 0},
        {"url": "gdl-ray:8000"},
        {"url": "http://gdl-ray:8000/path"},
    ],
)
def test_what_cannot_be_is_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(args))):
        built(**args)
