"""What nodes may do on AWS: the documents of their roles, each with the least that its node needs.

Workers read and write the bucket. The head does so too, and launches, tags and ends instances of its own
stack, which are those with its tag. Neither can touch another stack's, nor make roles, keys or networks.
"""

from typing import Any, Literal

from infra.aws_cloud import TAG

Document = dict[str, Any]
Effect = Literal["Allow"]

TRUST: Document = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    ],
}


def worker_policy(*, bucket: str, partition: str, ssm: bool) -> Document:
    """Write what a worker may do: use the bucket, and with `ssm` be reached through AWS Systems Manager."""
    return {"Version": "2012-10-17", "Statement": _storage(bucket, partition) + (_ssm() if ssm else [])}


def head_policy(
    *, stack: str, bucket: str, partition: str, region: str, account: str, worker_role: str, ssm: bool
) -> Document:
    """Write what the head may do: what a worker may, and to launch and end nodes of its stack.

    Args:
        stack: Name of the stack.
        bucket: Name of its bucket.
        partition: `aws`, `aws-cn` or `aws-us-gov`.
        region: Where its instances are.
        account: Whose they are.
        worker_role: The one role that it may give to nodes that it launches, by its ARN.
        ssm: Whether users come through AWS Systems Manager.
    """
    ours = f"arn:{partition}:ec2:{region}:{account}"
    shared = ("network-interface", "subnet", "security-group", "key-pair", "spot-instances-request")
    return {
        "Version": "2012-10-17",
        "Statement": [
            _allow("Look", ["ec2:DescribeInstances"], "*"),
            _allow(
                "LaunchTagged",
                ["ec2:RunInstances"],
                [f"{ours}:instance/*", f"{ours}:volume/*"],
                {"StringEquals": {f"aws:RequestTag/{TAG}": stack}},
            ),
            _allow(
                "LaunchWith",
                ["ec2:RunInstances"],
                [f"arn:{partition}:ec2:{region}::image/*", *(f"{ours}:{each}/*" for each in shared)],
            ),
            _allow(
                "TagAtLaunch",
                ["ec2:CreateTags"],
                [f"{ours}:instance/*", f"{ours}:volume/*"],
                {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
            ),
            _allow(
                "TagAndEndOwn",
                ["ec2:CreateTags", "ec2:TerminateInstances"],
                [f"{ours}:instance/*"],
                {"StringEquals": {f"aws:ResourceTag/{TAG}": stack}},
            ),
            _allow(
                "GiveWorkersTheirRole",
                ["iam:PassRole"],
                [worker_role],
                {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
            ),
            *_storage(bucket, partition),
            *(_ssm() if ssm else []),
        ],
    }


def _storage(bucket: str, partition: str) -> list[Document]:
    arn = f"arn:{partition}:s3:::{bucket}"
    of_bucket = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
    of_objects = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
    of_parts = ["s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    return [
        _allow("Bucket", of_bucket, [arn]),
        _allow("Objects", of_objects + of_parts, [f"{arn}/*"]),
    ]


def _ssm() -> list[Document]:
    """Allow what Session Manager's agent needs; Amazon's managed policy allows much more."""
    channels = ("CreateControlChannel", "CreateDataChannel", "OpenControlChannel", "OpenDataChannel")
    calls = ["ssm:UpdateInstanceInformation", *(f"ssmmessages:{each}" for each in channels)]
    return [_allow("Sessions", calls, "*")]


def _allow(
    sid: str, actions: list[str], resources: list[str] | str, condition: Document | None = None
) -> Document:
    statement: Document = {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources}
    return statement | ({"Condition": condition} if condition else {})
