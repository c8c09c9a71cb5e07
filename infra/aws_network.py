"""The security group of a stack on AWS: open to its own nodes alone, and for ssh to its user's addresses.

Ray's ports ask for a token at most, so this group is what keeps strangers out: a rule that is not the stack's
is taken away.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from infra.aws_cloud import EXPIRES, Cloud, Tags, expiry, tag_list, tags_of
from infra.plan import Refused, Step
from infra.stack import Stack

Rule = tuple[bool, str, int, int, str]
"""Of a security group: outward, protocol and first and last port (-1 for all), and the other side."""
ANYWHERE = "0.0.0.0/0"
SELF = "itself"
INSIDE: Rule = (False, "-1", -1, -1, SELF)
OUTWARD: Rule = (True, "-1", -1, -1, ANYWHERE)


def steps(cloud: Cloud, stack: Stack, cidr: str, tags: Tags) -> Iterator[Step]:
    """List what is to be done until the group is there, with its rules and no others."""
    name = cloud.cluster
    want = {INSIDE, OUTWARD}
    if stack.access.mode == "ssh":
        want.add((False, "tcp", 22, 22, cidr))
    group = cloud.group()
    have = {OUTWARD: ""} if group is None else _rules(cloud, group["GroupId"])
    if group is None:
        yield Step(f"create security group {name}", partial(_create_group, cloud, tags, stack.ttl_hours))
    elif not tags.items() <= tags_of(group).items():
        call = partial(cloud.ec2.create_tags, Resources=[group["GroupId"]], Tags=tag_list(tags))
        yield Step(f"tag security group {name}", call)
    for rule in sorted(want - have.keys()):
        yield Step(f"open security group {name}: {told(rule)}", partial(_open, cloud, rule))
    for rule in sorted(have.keys() - want):
        call = partial(_close, cloud, rule[0], have[rule])
        yield Step(f"close security group {name}: {told(rule)}, which is not ours", call)


def group_id(cloud: Cloud) -> str:
    """Find the id of the group.

    Raises:
        Refused: It is not there, or AWS does not know it yet.
    """
    group = cloud.group()
    if group is None:
        raise Refused(f"security group {cloud.cluster} is not there: run `up` again, which makes it")
    return str(group["GroupId"])


def told(rule: Rule) -> str:
    """Tell a rule of a security group: `tcp 22 from 203.0.113.7/32`."""
    outward, protocol, first, last, other = rule
    ports = "" if first == -1 else f" {first}" if first == last else f" {first}-{last}"
    return f"{'everything' if protocol == '-1' else protocol}{ports} {'to' if outward else 'from'} {other}"


def _rules(cloud: Cloud, group: str) -> dict[Rule, str]:
    """List the rules of a security group, with the id of each."""
    filters = [{"Name": "group-id", "Values": [group]}]
    pages = cloud.ec2.get_paginator("describe_security_group_rules").paginate(Filters=filters)
    described = [rule for page in pages for rule in page["SecurityGroupRules"]]
    return {_rule(rule, group): rule["SecurityGroupRuleId"] for rule in described}


def _rule(described: dict[str, Any], group: str) -> Rule:
    other = described.get("ReferencedGroupInfo", {}).get("GroupId")
    source = SELF if other == group else other
    for name in ("CidrIpv4", "CidrIpv6", "PrefixListId"):
        source = source or described.get(name)
    ports = described.get("FromPort", -1), described.get("ToPort", -1)
    return described["IsEgress"], described["IpProtocol"], *ports, str(source)


def _create_group(cloud: Cloud, tags: Tags, ttl_hours: float) -> None:
    tags = {**tags, EXPIRES: expiry(ttl_hours)}
    specification = {"ResourceType": "security-group", "Tags": tag_list(tags)}
    made = cloud.ec2.create_security_group(
        GroupName=cloud.cluster,
        Description=f"Nodes of the stack {cloud.name}: open to each other alone",
        VpcId=default_vpc(cloud),
        TagSpecifications=[specification],
    )
    cloud.ec2.get_waiter("security_group_exists").wait(GroupIds=[made["GroupId"]])


def default_vpc(cloud: Cloud) -> str:
    """Find the network that nodes are put in.

    Raises:
        Refused: The account has none in this region.
    """
    vpcs = cloud.ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise Refused(
            f"region {cloud.region} has no default network: make one with "
            f"`aws ec2 create-default-vpc --region {cloud.region}`, or choose another region"
        )
    return str(vpcs[0]["VpcId"])


def _open(cloud: Cloud, rule: Rule) -> None:
    group = group_id(cloud)
    outward, protocol, first, last, other = rule
    permission: dict[str, Any] = {"IpProtocol": protocol}
    if first != -1:
        permission |= {"FromPort": first, "ToPort": last}
    if other == SELF:
        permission["UserIdGroupPairs"] = [{"GroupId": group}]
    else:
        permission["IpRanges"] = [{"CidrIp": other}]
    ec2 = cloud.ec2
    authorize = ec2.authorize_security_group_egress if outward else ec2.authorize_security_group_ingress
    authorize(GroupId=group, IpPermissions=[permission])


def _close(cloud: Cloud, outward: bool, rule_id: str) -> None:
    ec2 = cloud.ec2
    revoke = ec2.revoke_security_group_egress if outward else ec2.revoke_security_group_ingress
    revoke(GroupId=group_id(cloud), SecurityGroupRuleIds=[rule_id])
