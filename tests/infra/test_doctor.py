"""The storage doctor, on a real S3 server, and on the same one with each of the faults that others have."""

import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from infra import doctor
from infra.doctor import CHECKSUMS, SETTING, Report, check, main

Application = Callable[[dict[str, Any], Callable[..., Any]], Any]
STEPS = ["1 B", "100 B", "11 MB in parts"]
ALL = [f"{verb} {what}" for what in STEPS for verb in ("write", "read")]
ALL += ["read ranges", "write folders", "read folders", "list", "delete"]


class Server:
    """An S3 server with a fault that tests choose."""

    def __init__(self) -> None:
        self.fault: Callable[[Application, dict[str, Any], Callable[..., Any]], Any] | None = None
        self._app: Application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.endpoint = f"127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if environ.get("HTTP_TRANSFER_ENCODING") == "chunked":  # as moto's own server reads it
            environ["wsgi.input_terminated"] = True
        return self.fault(self._app, environ, start) if self.fault else self._app(environ, start)

    def address(self, place: str) -> str:
        return f"s3://{place}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    @property
    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=f"http://{self.endpoint}", region_name="us-east-1")

    def list(self) -> list[str]:
        return [found["Key"] for found in self.client.list_objects_v2(Bucket="runs").get("Contents", [])]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv(CHECKSUMS, raising=False)
        patch.setattr(logging.getLogger("werkzeug"), "level", logging.ERROR)
        server = Server()
        server.client.create_bucket(Bucket="runs")
        yield server
        server.close()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running
    running.fault = None
    for key in running.list():  # of the servers that do not delete
        running.client.delete_object(Bucket="runs", Key=key)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are found on small files too; the healthy server gets the large one."""
    monkeypatch.setattr(doctor, "_LARGE_BYTES", 50_000)


def failed(report: Report) -> list[str]:
    return [step.name for step in report.steps if not step.ok]


def body(environ: dict[str, Any]) -> bytes:
    length = environ.get("CONTENT_LENGTH")
    return bytes(environ["wsgi.input"].read(int(length)) if length else environ["wsgi.input"].read())


def with_body(environ: dict[str, Any], content: bytes) -> dict[str, Any]:
    return environ | {"wsgi.input": io.BytesIO(content), "CONTENT_LENGTH": str(len(content))}


def answer(app: Application, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
    """What the healthy server answers."""
    told: list[Any] = []
    content = b"".join(app(environ, lambda status, headers, *_: told.extend((status, headers))))
    return told[0], told[1], content


def is_content(environ: dict[str, Any]) -> bool:
    files = (".bin", "/top", "/model", "/state")
    return environ["REQUEST_METHOD"] == "GET" and str(environ["PATH_INFO"]).endswith(files)


def sends_checksum(environ: dict[str, Any]) -> bool:
    return "TRAILER" in environ.get("HTTP_X_AMZ_CONTENT_SHA256", "")


def corrupts(app: Application, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    """Flip a bit of what is read."""
    status, headers, content = answer(app, environ)
    if is_content(environ) and content:
        content = bytes([content[0] ^ 1]) + content[1:]
        headers = [(name, value) for name, value in headers if "checksum" not in name.lower()]
    start(status, headers)
    return [content]


def keeps_the_checksum(app: Application, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    """Store the content together with the frame and the checksum that it came in."""
    if sends_checksum(environ):
        hidden = ("HTTP_X_AMZ_", "HTTP_CONTENT_ENCODING", "HTTP_TRANSFER_ENCODING", "wsgi.input_terminated")
        environ = {name: value for name, value in environ.items() if not name.startswith(hidden)} | {
            "wsgi.input": environ["wsgi.input"]
        }
        environ = with_body(environ, body(environ))
    return app(environ, start)


def wants_a_length(app: Application, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    """Refuse what comes with a checksum behind it."""
    if not sends_checksum(environ):
        return app(environ, start)
    body(environ)
    start("411 Length Required", [("Content-Type", "application/xml")])
    return [b"<Error><Code>MissingContentLength</Code><Message>give a length</Message></Error>"]


def truncates_ranges(app: Application, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    """Answer a range from the middle with half of it."""
    status, headers, content = answer(app, environ)
    if not environ.get("HTTP_RANGE", "bytes=0-").startswith("bytes=0-"):
        content = content[: len(content) // 2]
        headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        headers.append(("Content-Length", str(len(content))))
    start(status, headers)
    return [content]


def keeps_all(app: Application, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    """Say that it is deleted, and keep it."""
    if environ["REQUEST_METHOD"] == "DELETE":
        start("204 No Content", [])
        return [b""]
    if environ["QUERY_STRING"].startswith("delete"):
        start("200 OK", [("Content-Type", "application/xml")])
        return [b'<?xml version="1.0"?><DeleteResult></DeleteResult>']
    return app(environ, start)


def forgets_in_lists(app: Application, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    """Leave files out of lists."""
    status, headers, content = answer(app, environ)
    if "list-type=2" in environ["QUERY_STRING"]:
        first, mark, rest = content.partition(b"<Contents>")
        content = first + rest.partition(b"</Contents>")[2] if mark else content
        headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
    start(status, headers)
    return [content]


def forbids(app: Application, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    """Allow to look, not to write."""
    if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
        return app(environ, start)
    body(environ)
    start("403 Forbidden", [("Content-Type", "application/xml")])
    return [b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"]


def test_a_good_server_is_fit_and_nothing_stays(server: Server) -> None:
    server.client.put_object(Bucket="runs", Key="of-others", Body=b"stays")
    report = check(server.address("runs/deep/below"))
    assert report.ok, report.text()
    assert [step.name for step in report.steps] == ALL
    assert server.list() == ["of-others"]
    assert not server.client.list_multipart_uploads(Bucket="runs").get("Uploads")


@pytest.mark.usefixtures("small")
def test_a_whole_bucket_is_fit_and_nothing_stays(server: Server) -> None:
    assert check(server.address("runs")).ok
    assert server.list() == []


@pytest.mark.usefixtures("small")
def test_what_is_there_already_stays(server: Server) -> None:
    server.client.put_object(Bucket="runs", Key="deep/run.json", Body=b"{}")
    assert check(server.address("runs/deep")).ok
    kept = server.client.get_object(Bucket="runs", Key="deep/run.json")["Body"].read()
    assert kept == b"{}"
    assert set(server.list()) <= {"deep/run.json", "deep/"}  # pyarrow's own mark of a folder that is there


def test_a_folder_is_fit_and_nothing_stays(tmp_path: Path) -> None:
    assert check(str(tmp_path / "new" / "folder")).ok
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("fault", "step", "cause"),
    [
        (corrupts, "read 100 B", "comes back altered"),
        (truncates_ranges, "read ranges", "the range of"),
        (keeps_all, "delete", "after they were deleted"),
        (forgets_in_lists, "list", "the list lacks"),
        (forbids, "write 1 B", "not allowed"),
    ],
)
def test_a_bad_server_is_found_out(
    server: Server, fault: Any, step: str, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = fault
    assert main([server.address("runs/here")]) == 3
    told = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"FAILED {step}") and cause in line for line in told), told
    assert "is not fit for checkpoints" in told[-1]
    assert step in told[-1]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("fault", "step", "cause"),
    [
        (keeps_the_checksum, "read 100 B", "comes back with"),
        (wants_a_length, "write 1 B", ""),
    ],
)
def test_a_server_that_takes_checksums_for_content_is_told_its_setting(
    server: Server, fault: Any, step: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault = fault
    report = check(server.address("runs/here"))
    assert step in failed(report)
    assert cause in next(found.cause for found in report.steps if found.name == step)
    assert report.setting == SETTING
    assert SETTING in report.text()
    assert not report.ok
    assert CHECKSUMS not in os.environ
    monkeypatch.setenv(*SETTING.split("="))
    assert check(server.address("runs/here")).ok


@pytest.mark.usefixtures("small")
def test_causes_are_told_with_their_cure(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = check(server.address("elsewhere/runs"))
    assert failed(report) == ["write 1 B"]
    assert "there is no bucket of this name" in report.text()
    assert failed(check(f"{tmp_path}/file/runs")) == ["write 1 B"]


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    report = check("s3://ada:secret@runs/x?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")
    assert failed(report) == ["open"]
    assert "no server answers" in report.text()
    assert "secret" not in report.text()


def test_google_is_not_waited_for_a_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_GCS_RETRY_S", 1)
    report = check("gs://anonymous@runs/x?scheme=http&endpoint_override=127.0.0.1:1")
    assert failed(report) == ["open"]
    assert "no server answers" in report.text()
    assert "retry_limit_seconds" not in report.address


def test_the_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert [step["name"] for step in told["steps"]] == ALL


def test_an_address_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["carrier-pigeon://roof"]) == 2
    assert "carrier-pigeon://roof" in capsys.readouterr().err
