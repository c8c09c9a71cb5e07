"""What people read when AWS refuses: each error in one line, with its cause and its cure."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore import exceptions  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from infra import aws
from infra.aws_errors import MEANINGS, explain, explain_output, explained
from infra.plan import Refused
from tests.infra.moto_aws import STACK, FakeAws, error, fake_aws

ARN = "arn:aws:iam::123456789012:user/ada"
CAPACITY = (
    "We currently do not have sufficient g6.xlarge capacity in the Availability Zone you requested "
    "(us-west-2a). You can currently get g6.xlarge capacity by not specifying an Availability Zone in your "
    "request or choosing us-west-2b, us-west-2c."
)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAws]:
    """An empty AWS."""
    with fake_aws(tmp_path) as fake:
        yield fake


@pytest.mark.parametrize(
    ("operation", "code", "message", "told"),
    [
        (
            "RunInstances",
            "InsufficientInstanceCapacity",
            CAPACITY,
            r"room in us-west-2b, us-west-2c\): add zones",
        ),
        ("RunInstances", "VcpuLimitExceeded", "", r"quota is used up .*servicequotas"),
        ("RunInstances", "MaxSpotInstanceCountExceeded", "", r"quota is used up .*servicequotas"),
        ("RunInstances", "SpotMaxPriceTooLow", "", r"spot market .*on-demand"),
        ("RunInstances", "UnauthorizedOperation", "Encoded: x", r"the action is ec2:RunInstances\): allow"),
        (
            "CreateRole",
            "AccessDenied",
            f"User: {ARN} is not authorized to perform: iam:CreateRole on resource: role r",
            r"the action is iam:CreateRole\): allow",
        ),
        ("DescribeVpcs", "ExpiredToken", "", r"credentials have expired .*aws sso login"),
        ("DescribeVpcs", "RequestExpired", "", r"credentials have expired .*aws sso login"),
        ("DescribeVpcs", "AuthFailure", "", r"does not know these credentials .*AWS_PROFILE"),
        ("ImportKeyPair", "RequestLimitExceeded", "", r"no more requests .*again in a minute"),
        ("PutBucketTagging", "SlowDown", "", r"no more requests .*again in a minute"),
        ("CreateInstanceProfile", "ServiceUnavailable", "", r"a failure of its own .*again in a minute"),
        ("RunInstances", "InvalidAMIID.NotFound", "", r"image is gone .*newest"),
        ("CreateBucket", "BucketAlreadyExists", "", r"another account owns .*storage.bucket"),
        ("CreateRole", "LimitExceeded", "", r"no more of these .*infra gc"),
        ("CreateSecurityGroup", "NeverHeardOf", "in two\nlines", r"answered NeverHeardOf .*: in two lines"),
    ],
)
def test_up_refuses_in_one_line(fake: FakeAws, operation: str, code: str, message: str, told: str) -> None:
    answer = error(code, message)
    fake.answers[operation] = lambda call: None if _is_rehearsal(call) else answer(call)
    with pytest.raises(Refused, match=told) as refused:
        aws.up(STACK, yes=True)
    assert "\n" not in str(refused.value)


def _is_rehearsal(call: object) -> bool:
    return "'DryRun'" in str(call)


def test_a_plan_names_the_permission_that_is_missing(fake: FakeAws) -> None:
    fake.answers["RunInstances"] = error(
        "UnauthorizedOperation", f"{ARN} may not. Encoded authorization: abc"
    )
    problems = aws.plan(STACK).problems
    assert problems == [next(iter(problems))]
    assert "the action is ec2:RunInstances" in problems[0]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (exceptions.NoCredentialsError(), "no AWS credentials .*aws configure"),
        (exceptions.PartialCredentialsError(provider="env", cred_var="x"), "no AWS credentials"),
        (exceptions.SSOTokenLoadError(error_msg="gone"), "login has expired .*aws sso login"),
        (exceptions.TokenRetrievalError(provider="sso", error_msg="x"), "login has expired"),
        (exceptions.ProfileNotFound(profile="work"), r"profile \(work\) .*list-profiles"),
        (exceptions.NoRegionError(), "region"),
        (exceptions.EndpointConnectionError(endpoint_url="https://x"), "does not answer .*network"),
        (exceptions.ConnectTimeoutError(endpoint_url="https://x"), "does not answer .*network"),
    ],
)
def test_what_keeps_from_asking_is_explained(raised: Exception, told: str) -> None:
    with pytest.raises(Refused, match=told), explained():
        raise raised


def test_what_is_not_about_aws_is_left_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), explained():
        _ = 1 / 0
    with pytest.raises(Refused, match=r"^as it is$"), explained():
        raise Refused("as it is")


def test_no_code_has_two_meanings() -> None:
    codes = [code for meaning in MEANINGS for code in meaning.codes]
    assert len(codes) == len(set(codes))


def test_the_output_of_ray_up_is_explained() -> None:
    shown = (
        "Launching a new cluster.\n"
        "  create_instances: Attempt failed with An error occurred (VcpuLimitExceeded) when calling the "
        "RunInstances operation: You have requested more vCPU capacity than your current limit of 0\n"
    )
    assert "quota is used up" in str(explain_output(shown))
    assert explain_output("Cluster: demo\nAll is well. NoSuchThing\n") is None


def test_an_answer_without_a_message_is_explained() -> None:
    refused = explain(ClientError({"Error": {"Code": "Odd"}}, "RunInstances"))
    assert str(refused).startswith("AWS answered Odd to RunInstances")
