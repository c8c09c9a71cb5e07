"""What the roles allow, by a reading of IAM's rules that is written for this test; moto enforces none."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import pytest

from infra.aws_policies import TRUST, head_policy, worker_policy

EC2 = "arn:aws:ec2:us-west-2:123456789012"
WORKER = "arn:aws:iam::123456789012:role/gdl-ray/gdl-ray-demo-us-west-2-worker"
OURS = {"aws:ResourceTag/gdl-ray:stack": "demo"}
THEIRS = {"aws:ResourceTag/gdl-ray:stack": "other"}
TO_EC2 = {"iam:PassedToService": "ec2.amazonaws.com"}
HEAD = head_policy(
    stack="demo",
    bucket="b",
    partition="aws",
    region="us-west-2",
    account="123456789012",
    worker_role=WORKER,
    ssm=False,
)
WORKERS = worker_policy(bucket="b", partition="aws", ssm=False)


def allows(document: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str]) -> bool:
    """Decide as IAM does: allowed by a statement whose action, resource and every condition match."""
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        resources = (
            statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        )
        conditions = statement.get("Condition", {})
        assert conditions.keys() <= {"StringEquals"}
        if (
            any(fnmatch.fnmatchcase(action, pattern) for pattern in statement["Action"])
            and any(fnmatch.fnmatchcase(resource, pattern) for pattern in resources)
            and all(context.get(key) == value for key, value in conditions.get("StringEquals", {}).items())
        ):
            return True
    return False


@pytest.mark.parametrize(
    ("action", "resource", "context", "head", "worker"),
    [
        ("s3:GetObject", "arn:aws:s3:::b/runs/x", {}, True, True),
        ("s3:PutObject", "arn:aws:s3:::b/runs/x", {}, True, True),
        ("s3:DeleteObject", "arn:aws:s3:::b/runs/x", {}, True, True),
        ("s3:AbortMultipartUpload", "arn:aws:s3:::b/runs/x", {}, True, True),
        ("s3:ListBucket", "arn:aws:s3:::b", {}, True, True),
        ("s3:GetObject", "arn:aws:s3:::other/x", {}, False, False),
        ("s3:ListBucket", "arn:aws:s3:::b2", {}, False, False),
        ("s3:DeleteBucket", "arn:aws:s3:::b", {}, False, False),
        ("s3:DeleteObjectVersion", "arn:aws:s3:::b/x", {}, False, False),
        ("s3:PutBucketPolicy", "arn:aws:s3:::b", {}, False, False),
        ("ec2:DescribeInstances", "*", {}, True, False),
        ("ec2:RunInstances", f"{EC2}:instance/*", {"aws:RequestTag/gdl-ray:stack": "demo"}, True, False),
        ("ec2:RunInstances", f"{EC2}:volume/*", {"aws:RequestTag/gdl-ray:stack": "demo"}, True, False),
        ("ec2:RunInstances", f"{EC2}:instance/*", {}, False, False),
        ("ec2:RunInstances", f"{EC2}:instance/*", {"aws:RequestTag/gdl-ray:stack": "x"}, False, False),
        ("ec2:RunInstances", f"{EC2}:subnet/subnet-1", {}, True, False),
        ("ec2:RunInstances", f"{EC2}:security-group/sg-1", {}, True, False),
        ("ec2:RunInstances", f"{EC2}:network-interface/*", {}, True, False),
        ("ec2:RunInstances", f"{EC2}:key-pair/k", {}, True, False),
        ("ec2:RunInstances", "arn:aws:ec2:us-west-2::image/ami-1", {}, True, False),
        ("ec2:RunInstances", "arn:aws:ec2:eu-west-1::image/ami-1", {}, False, False),
        ("ec2:CreateTags", f"{EC2}:instance/*", {"ec2:CreateAction": "RunInstances"}, True, False),
        ("ec2:CreateTags", f"{EC2}:instance/i-1", OURS, True, False),
        ("ec2:CreateTags", f"{EC2}:instance/i-1", THEIRS, False, False),
        ("ec2:CreateTags", f"{EC2}:security-group/sg-1", OURS, False, False),
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1", OURS, True, False),
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1", THEIRS, False, False),
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1", {}, False, False),
        ("ec2:AuthorizeSecurityGroupIngress", f"{EC2}:security-group/sg-1", OURS, False, False),
        ("iam:PassRole", WORKER, TO_EC2, True, False),
        ("iam:PassRole", WORKER, {}, False, False),
        ("iam:PassRole", WORKER.replace("-worker", "-head"), TO_EC2, False, False),
        ("iam:CreateRole", WORKER, {}, False, False),
        ("ssmmessages:OpenDataChannel", "*", {}, False, False),
    ],
)
def test_nodes_may_do_what_they_must_and_nothing_else(
    action: str, resource: str, context: dict[str, str], head: bool, worker: bool
) -> None:
    assert allows(HEAD, action, resource, context) == head
    assert allows(WORKERS, action, resource, context) == worker


def test_session_manager_is_allowed_where_users_come_by_it() -> None:
    document = worker_policy(bucket="b", partition="aws", ssm=True)
    assert allows(document, "ssmmessages:OpenDataChannel", "*", {})
    assert allows(document, "ssm:UpdateInstanceInformation", "*", {})
    assert not allows(document, "ssm:StartSession", "*", {})
    assert not allows(document, "ssm:GetParameter", "*", {})


def test_no_statement_allows_a_pattern_of_actions() -> None:
    for document in (HEAD, WORKERS):
        assert not [action for each in document["Statement"] for action in each["Action"] if "*" in action]


def test_machines_alone_assume_the_roles() -> None:
    (statement,) = TRUST["Statement"]
    assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}
