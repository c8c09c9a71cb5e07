"""What `python -m serve` lets in; that it starts is tested with the platform."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from serve import __main__ as command
from serve import keys
from serve.replica import Settings


def settings(**asked: Any) -> Settings:
    usual = {"host": "127.0.0.1", "http_port": 8000, "replicas": "1", "gpus": 0.0, "models": 32}
    return command._settings(argparse.Namespace(**{**usual, "cors_origin": [], **asked}))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_RAY_HOME", str(tmp_path))


def test_loopback_asks_for_no_key() -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1"):
        assert not settings(host=host).require_keys


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::"])
def test_other_addresses_ask_for_a_key_that_there_is(host: str) -> None:
    with pytest.raises(
        ValueError, match=r"there is no API key yet: make one first, with `python -m serve.keys add"
    ):
        settings(host=host)
    keys.add(keys.keys_file(), "ada")
    assert settings(host=host).require_keys


def test_the_registry_is_told_an_address_that_can_be_reached() -> None:
    assert settings(http_port=8123).url == "http://127.0.0.1:8123"
    keys.add(keys.keys_file(), "ada")
    assert settings(host="0.0.0.0").url == "http://127.0.0.1:8000"


def test_the_pool_is_as_asked_for() -> None:
    asked = settings(replicas="1:4", gpus=0.25, models=3, cors_origin=["http://page"])
    assert (asked.replicas, asked.gpus, asked.models) == ((1, 4), 0.25, 3)
    assert asked.cors_origins == ("http://page",)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"host": "home"}, "host"),
        ({"replicas": "0"}, "replicas='0' must be a number"),
        ({"replicas": "0:2"}, "must keep one at least"),
        ({"gpus": -1.0}, "--gpus -1"),
        ({"models": 0}, "--models 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings(**asked)
