"""From a stack on AWS back to nothing: end what is there, make sure that it is gone, and name what is not.

All of it is found by tag or name, whoever made it and however far they came. Each call may find that its work
is done already; so a `down` that was interrupted is run again, and a second one does nothing.
"""

import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from infra.aws_cloud import (
    EXPIRES,
    KINDS,
    LIVE,
    PATH,
    PRICES_REGION,
    TAG,
    Cloud,
    Tags,
    absent_is_none,
    tags_of,
)
from infra.aws_errors import code_of

PAUSE_S = 5.0
"""Between two looks at what takes its time."""
PATIENCE_S = 600.0
"""How long to wait for machines to end, and for what they used to be free."""
STILL_USED = ("DependencyViolation", "VolumeInUse", "IncorrectState", "DeleteConflict", "InvalidGroup.InUse")
GONE = ("InvalidVolume.NotFound", "InvalidGroup.NotFound", "InvalidInstanceID.NotFound", "NoSuchEntity")
GONE_BUCKET = ("NoSuchBucket", "NoSuchUpload", "404")
LONG_AGO = datetime.min.replace(tzinfo=UTC)


def end(cloud: Cloud, *, delete_data: bool, tell: Callable[[str], None] = print) -> list[str]:
    """End everything of a stack: nodes, disks, security group, roles, key; its bucket if asked.

    Args:
        cloud: AWS under the stack's name.
        delete_data: Whether the bucket that was made for the stack goes too, with every version in it.
        tell: Takes a line for each thing that is ended.

    Returns:
        What is left, a line for each; empty when all is gone.
    """
    _end_machines(cloud, tell)
    for volume in cloud.volumes():
        tell(f"delete volume {volume}")
        _until_free(partial(cloud.ec2.delete_volume, VolumeId=volume))
    for group in cloud.groups():
        tell(f"delete security group {group['GroupName']}")
        _until_free(partial(cloud.ec2.delete_security_group, GroupId=group["GroupId"]))
    for kind in KINDS:
        _end_profile(cloud, cloud.role(kind), tell)
        _end_role(cloud, cloud.role(kind), tell)
    for key in cloud.key_pairs():
        tell(f"delete key pair {key['KeyName']}")
        cloud.ec2.delete_key_pair(KeyName=key["KeyName"])
    if delete_data and cloud.bucket_exists(cloud.bucket):
        tell(f"delete bucket {cloud.bucket}, with all versions of what is in it")
        _end_bucket(cloud, cloud.bucket)
    if not remaining(cloud, with_data=delete_data):
        return []
    time.sleep(PAUSE_S)  # AWS may go on for a moment to tell of what is gone
    return remaining(cloud, with_data=delete_data)


def remaining(cloud: Cloud, *, with_data: bool) -> list[str]:
    """List what there is of a stack, a line for each thing; its bucket only `with_data`."""
    found = [f"instance {each.id} ({each.kind}, {each.type}, {each.state})" for each in cloud.machines(LIVE)]
    found += [f"volume {volume}" for volume in cloud.volumes()]
    found += [f"security group {group['GroupId']} ({group['GroupName']})" for group in cloud.groups()]
    for kind in KINDS:
        name = cloud.role(kind)
        if absent_is_none(cloud.iam.get_instance_profile, InstanceProfileName=name):
            found.append(f"instance profile {name}")
        if absent_is_none(cloud.iam.get_role, RoleName=name):
            found.append(f"role {name}")
    found += [f"key pair {key['KeyName']}" for key in cloud.key_pairs()]
    if with_data and cloud.bucket_exists(cloud.bucket):
        found.append(f"bucket {cloud.bucket}")
    return [f"{each} in {cloud.region}" for each in found]


def _end_machines(cloud: Cloud, tell: Callable[[str], None]) -> None:
    """Terminate what runs, waits or stands still, and look again when all is gone.

    The second look finds what a head has launched in the moment in which it was ended itself.
    """
    deadline = time.monotonic() + PATIENCE_S
    told: set[str] = set()
    clear = 0
    while clear < 2 and time.monotonic() < deadline:
        machines = cloud.machines(LIVE)
        clear = 0 if machines else clear + 1
        for machine in machines:
            if machine.id not in told:
                tell(f"terminate {machine.kind} {machine.id} ({machine.type}, {machine.state})")
                told.add(machine.id)
        if ending := [machine.id for machine in machines if machine.state != "shutting-down"]:
            _unless(GONE, partial(cloud.ec2.terminate_instances, InstanceIds=ending))
        if told:
            time.sleep(PAUSE_S)


def _until_free(call: Callable[[], object]) -> None:
    """Delete something as soon as nothing uses it; what patience does not free is told with what remains."""
    deadline = time.monotonic() + PATIENCE_S
    while _unless((*STILL_USED, *GONE), call) in STILL_USED and time.monotonic() < deadline:
        time.sleep(PAUSE_S)


def _unless(codes: tuple[str, ...], call: Callable[[], object]) -> str:
    """Call AWS; return the code of its answer if it is one of these errors, else an empty word."""
    try:
        call()
    except ClientError as error:
        if code_of(error) in codes:
            return code_of(error)
        raise
    return ""


def _end_profile(cloud: Cloud, name: str, tell: Callable[[str], None]) -> None:
    profile = absent_is_none(cloud.iam.get_instance_profile, InstanceProfileName=name)
    if profile is None:
        return
    tell(f"delete instance profile {name}")
    for role in profile["InstanceProfile"]["Roles"]:
        cloud.iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=role["RoleName"])
    _unless(GONE, partial(cloud.iam.delete_instance_profile, InstanceProfileName=name))


def _end_role(cloud: Cloud, name: str, tell: Callable[[str], None]) -> None:
    iam = cloud.iam
    if absent_is_none(iam.get_role, RoleName=name) is None:
        return
    tell(f"delete role {name}")
    for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        iam.delete_role_policy(RoleName=name, PolicyName=policy)
    for attached in iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]:
        iam.detach_role_policy(RoleName=name, PolicyArn=attached["PolicyArn"])
    for profile in iam.list_instance_profiles_for_role(RoleName=name)["InstanceProfiles"]:
        iam.remove_role_from_instance_profile(
            InstanceProfileName=profile["InstanceProfileName"], RoleName=name
        )
    _unless(GONE, partial(iam.delete_role, RoleName=name))


def _end_bucket(cloud: Cloud, name: str) -> None:
    s3 = cloud.s3
    for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=name):
        for upload in page.get("Uploads", []):
            abort = partial(
                s3.abort_multipart_upload, Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"]
            )
            _unless(GONE_BUCKET, abort)
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=name):
        versions = page.get("Versions", []) + page.get("DeleteMarkers", [])
        objects = [{"Key": each["Key"], "VersionId": each["VersionId"]} for each in versions]
        if objects:
            s3.delete_objects(Bucket=name, Delete={"Objects": objects, "Quiet": True})
    _unless(GONE_BUCKET, partial(s3.delete_bucket, Bucket=name))


def regions() -> list[str]:
    """List the regions that the account may use."""
    answer = Cloud("", PRICES_REGION).ec2.describe_regions()
    return sorted(each["RegionName"] for each in answer["Regions"])


def stacks_in(region: str) -> dict[str, datetime]:
    """Find the stacks of which something is left in a region, and when each expires; leftovers have."""
    cloud = Cloud("", region)
    found = dict.fromkeys(_stacks_of_roles(cloud), LONG_AGO)
    for tags in _tags(cloud):
        found[tags[TAG]] = max(found.get(tags[TAG], LONG_AGO), moment(tags.get(EXPIRES, "")))
    return found


def _stacks_of_roles(cloud: Cloud) -> Iterator[str]:
    pattern = re.compile(rf"gdl-ray-(.+)-{re.escape(cloud.region)}-(?:{'|'.join(KINDS)})")
    for page in cloud.iam.get_paginator("list_roles").paginate(PathPrefix=PATH):
        for role in page["Roles"]:
            if match := pattern.fullmatch(role["RoleName"]):
                yield match[1]


def _tags(cloud: Cloud) -> Iterator[dict[str, str]]:
    """Read the tags of all instances, disks, groups and keys of a region that belong to a stack."""
    tagged = [{"Name": "tag-key", "Values": [TAG]}]
    live = [*tagged, {"Name": "instance-state-name", "Values": list(LIVE)}]
    ec2 = cloud.ec2
    for page in ec2.get_paginator("describe_instances").paginate(Filters=live):
        for reservation in page["Reservations"]:
            yield from map(tags_of, reservation["Instances"])
    for page in ec2.get_paginator("describe_volumes").paginate(Filters=tagged):
        yield from map(tags_of, page["Volumes"])
    yield from map(tags_of, ec2.describe_security_groups(Filters=tagged)["SecurityGroups"])
    yield from map(tags_of, ec2.describe_key_pairs(Filters=tagged)["KeyPairs"])


def is_over(tags: Tags) -> bool:
    """Tell whether the time of something is over; what has no time has not."""
    return EXPIRES in tags and moment(tags[EXPIRES]) < datetime.now(UTC)


def moment(text: str) -> datetime:
    """Read a moment as the tags have it, in ISO 8601; long ago where there is none."""
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        return LONG_AGO
    return read if read.tzinfo else read.replace(tzinfo=UTC)
