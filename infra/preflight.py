"""What can be known of nodes before any is paid for: image, zones, machines, prices, quota and permissions.

Everything here is asked, nothing is made. What would keep the stack from running is told as a problem, with
its cure, and all problems at once.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from infra.aws_cloud import PRICES_REGION, TAG, Cloud, tag_list, tags_of
from infra.aws_errors import code_of, explain
from infra.plan import NodePlan, Refused
from infra.stack import Stack

IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
"""Where AWS publishes the id of its newest deep learning image: NVIDIA's driver, Docker, Ubuntu 24.04."""
ON_DEMAND = "on-demand"

# Quotas count vCPUs by letters of the type and by market. Those not here are found by their name.
STANDARD = frozenset(["a", "c", "d", "h", "i", "im", "is", "m", "r", "t", "z"])
GRAPHICS = frozenset(("g", "gr", "vt"))
QUOTAS = {
    ("standard", ON_DEMAND): "L-1216C47A",
    ("standard", "spot"): "L-34B43A08",
    ("G and VT", ON_DEMAND): "L-DB2E81BA",
    ("G and VT", "spot"): "L-3819A6DF",
    ("P", ON_DEMAND): "L-417A185B",
    ("P4, P3 and P2", "spot"): "L-7212CCBC",
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A type of machine, as EC2 describes it."""

    type: str
    vcpus: int
    memory_mib: int
    gpus: int
    """Whole GPUs; a fraction of one counts as none, for Ray would count it so."""
    gpu: str
    """What Ray calls its GPU, such as `L4`; empty without one."""
    architecture: str
    markets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Need:
    """One kind of nodes of the stack."""

    name: str
    type: str
    market: str
    max: int


@dataclass(kw_only=True)
class Survey:
    """What was found, before anything is made."""

    image: str
    machines: dict[str, Machine] = field(default_factory=dict)
    subnets: dict[str, str] = field(default_factory=dict)
    """Subnet of each zone, in the order in which zones are to be tried."""
    zones: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of each machine type, the zones that have it, in that order."""
    on_demand_usd: dict[str, float] = field(default_factory=dict)
    """Price per hour of each machine type."""
    spot_usd: dict[str, dict[str, float]] = field(default_factory=dict)
    """Price per hour of each machine type in each zone, now."""
    quotas: dict[str, str] = field(default_factory=dict)
    """Of each kind of nodes, quota against need."""
    problems: list[str] = field(default_factory=list)

    def price(self, type_: str, market: str, zone: str = "") -> float | None:
        """Price of an hour, as far as it is known: on the spot market, now, in that zone or the dearest."""
        spot = self.spot_usd.get(type_, {})
        if market != "spot" or not spot:
            return self.on_demand_usd.get(type_)
        return spot.get(zone, max(spot.values()))


def needs(stack: Stack) -> list[Need]:
    """List the kinds of nodes that a stack may run, the head first."""
    head = Need(name="head", type=stack.head.type, market=ON_DEMAND, max=1)
    return [head, *(Need(name=w.name, type=w.type, market=w.market, max=w.max) for w in stack.workers)]


def survey(cloud: Cloud, stack: Stack, image: str = "", zones: Iterable[str] = ()) -> Survey:
    """Ask AWS all that a stack needs to know.

    Args:
        cloud: AWS in the stack's region.
        stack: What should be.
        image: The machine image of the nodes that run; empty for the newest.
        zones: The order of zones of the nodes that run; empty for the cheapest first.

    Raises:
        Refused: A machine type or the network does not exist, or AWS could not be asked.
    """
    found = Survey(image=image or newest_image(cloud))
    wanted = needs(stack)
    types = sorted({need.type for need in wanted})
    found.machines = machines(cloud, types)
    found.spot_usd = spot_prices(cloud, sorted({need.type for need in wanted if need.market == "spot"}))
    _find_zones(cloud, stack, types, list(zones), found)
    found.problems += _machine_problems(wanted, found.machines)
    found.problems += _price_problems(cloud, types, found)
    found.problems += _quota_problems(cloud, wanted, found)
    return found


def node_plans(stack: Stack, found: Survey) -> list[NodePlan]:
    """Tell of each kind of nodes where it would run and what it costs."""
    return [
        NodePlan(
            name=need.name,
            type=need.type,
            market=need.market,
            max=need.max,
            zones=found.zones.get(need.type, ()),
            usd_per_hour=found.price(need.type, need.market),
            quota=found.quotas.get(need.name, ""),
        )
        for need in needs(stack)
    ]


def worst_usd_per_hour(stack: Stack, found: Survey) -> float | None:
    """Price an hour in which all nodes run, with spot machines at the on-demand price, which is their bound.

    Returns:
        Dollars; None where a price is not known.
    """
    prices = [(need.max, found.on_demand_usd.get(need.type)) for need in needs(stack)]
    return None if any(price is None for _, price in prices) else sum(n * (price or 0) for n, price in prices)


def budget_problems(stack: Stack, found: Survey) -> Iterator[str]:
    """Compare the worst case with the budget."""
    worst, most = worst_usd_per_hour(stack, found), stack.budget.max_hourly_usd
    if worst is None:
        unknown = sorted({need.type for need in needs(stack)} - found.on_demand_usd.keys())
        yield (
            f"budget.max_hourly_usd: {most:g} cannot be kept, for the price of {', '.join(unknown)} is not "
            "known: allow pricing:GetProducts, or choose a type that Amazon sells"
        )
    elif worst > most:
        yield (
            f"budget.max_hourly_usd: {most:g} is less than {worst:.2f} $/h, the cost when all nodes run: "
            f"lower `max` of the workers, or raise the budget to {worst:.2f}"
        )


def newest_image(cloud: Cloud) -> str:
    """Find the newest machine image in AWS's public list."""
    return str(cloud.client("ssm").get_parameter(Name=IMAGE)["Parameter"]["Value"])


def machines(cloud: Cloud, types: list[str]) -> dict[str, Machine]:
    """Describe machine types.

    Raises:
        Refused: The region does not know one of them.
    """
    try:
        pages = cloud.ec2.get_paginator("describe_instance_types").paginate(InstanceTypes=types)
        described = [each for page in pages for each in page["InstanceTypes"]]
    except ClientError as error:
        if code_of(error) != "InvalidInstanceType":
            raise
        unknown = re.search(r"\[(.*?)\]", str(error))
        raise Refused(
            f"type: {unknown[1] if unknown else ', '.join(types)} is no machine type of {cloud.region}: "
            "`aws ec2 describe-instance-types` lists them"
        ) from error
    return {each["InstanceType"]: _machine(each) for each in described}


def _machine(described: Mapping[str, Any]) -> Machine:
    gpus = [gpu for gpu in described.get("GpuInfo", {}).get("Gpus", []) if gpu.get("Count")]
    return Machine(
        type=described["InstanceType"],
        vcpus=described["VCpuInfo"]["DefaultVCpus"],
        memory_mib=described["MemoryInfo"]["SizeInMiB"],
        gpus=sum(gpu["Count"] for gpu in gpus),
        gpu=gpus[0]["Name"] if gpus else "",
        architecture=described["ProcessorInfo"]["SupportedArchitectures"][0],
        markets=tuple(described.get("SupportedUsageClasses", (ON_DEMAND,))),
    )


def _machine_problems(wanted: list[Need], known: Mapping[str, Machine]) -> Iterator[str]:
    for need in wanted:
        machine = known[need.type]
        if machine.architecture != "x86_64":
            yield f"{need.name}: {need.type} is {machine.architecture}, and the image x86_64: choose another"
        if need.market not in machine.markets:
            yield f"{need.name}: AWS has no {need.market} market for {need.type}: choose the other market"


def spot_prices(cloud: Cloud, types: list[str]) -> dict[str, dict[str, float]]:
    """Ask what machines cost on the spot market now, in dollars per hour, by type and zone."""
    prices: dict[str, dict[str, float]] = {type_: {} for type_ in types}
    if types:
        pages = cloud.ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=types, ProductDescriptions=["Linux/UNIX"], StartTime=datetime.now(UTC)
        )
        for each in (each for page in pages for each in page["SpotPriceHistory"]):
            prices[each["InstanceType"]][each["AvailabilityZone"]] = float(each["SpotPrice"])
    return prices


def _find_zones(cloud: Cloud, stack: Stack, types: list[str], pinned: list[str], found: Survey) -> None:
    """Find where each type can run, zones in which the first spot workers cost least first."""
    subnets = default_subnets(cloud)
    asked = set(subnets) if stack.zones == "auto" else set(stack.zones)
    offered = offerings(cloud, types)
    spot: dict[str, float] = next((found.spot_usd[w.type] for w in stack.workers if w.market == "spot"), {})
    cheapest = sorted(subnets.keys() & asked, key=lambda zone: (spot.get(zone, float("inf")), zone))
    order = pinned or [zone for zone in cheapest if any(zone in offered[type_] for type_ in types)]
    found.subnets = {zone: subnets[zone] for zone in order if zone in subnets}
    for name in sorted(asked - subnets.keys()):
        found.problems.append(
            f"zones: {name!r} has no default subnet: choose from {', '.join(sorted(subnets))}"
        )
    for type_ in types:
        found.zones[type_] = tuple(zone for zone in found.subnets if zone in offered[type_])
        if not found.zones[type_]:
            have = ", ".join(sorted(offered[type_])) or "none of this region"
            found.problems.append(f"zones: none of the stack's has {type_}; these have: {have}")


def default_subnets(cloud: Cloud) -> dict[str, str]:
    """Find the default subnet of each zone of the region, by zone."""
    filters = [{"Name": "default-for-az", "Values": ["true"]}]
    pages = cloud.ec2.get_paginator("describe_subnets").paginate(Filters=filters)
    return {each["AvailabilityZone"]: each["SubnetId"] for page in pages for each in page["Subnets"]}


def offerings(cloud: Cloud, types: list[str]) -> dict[str, set[str]]:
    """Ask which zones have which machine types, by type."""
    zones: dict[str, set[str]] = {type_: set() for type_ in types}
    pages = cloud.ec2.get_paginator("describe_instance_type_offerings").paginate(
        LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": types}]
    )
    for each in (each for page in pages for each in page["InstanceTypeOfferings"]):
        zones[each["InstanceType"]].add(each["Location"])
    return zones


def on_demand_prices(cloud: Cloud, types: list[str]) -> dict[str, float]:
    """Ask what Linux machines cost on demand, in dollars per hour; a type that has no price is left out."""
    pricing = cloud.client("pricing", PRICES_REGION)
    found = {type_: _on_demand_price(pricing, type_, cloud.region) for type_ in types}
    return {type_: price for type_, price in found.items() if price is not None}


def _on_demand_price(pricing: Any, type_: str, region: str) -> float | None:
    terms = {
        "instanceType": type_,
        "regionCode": region,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
        "marketoption": "OnDemand",
    }
    filters = [{"Type": "TERM_MATCH", "Field": key, "Value": value} for key, value in terms.items()]
    for product in pricing.get_products(ServiceCode="AmazonEC2", Filters=filters)["PriceList"]:
        for offer in json.loads(product)["terms"].get("OnDemand", {}).values():
            for dimension in offer["priceDimensions"].values():
                if dimension["unit"] == "Hrs":
                    return float(dimension["pricePerUnit"]["USD"])
    return None


def _price_problems(cloud: Cloud, types: list[str], found: Survey) -> Iterator[str]:
    try:
        found.on_demand_usd = on_demand_prices(cloud, types)
    except ClientError as error:
        yield f"prices: {explain(error)}"


def _quota_problems(cloud: Cloud, wanted: list[Need], found: Survey) -> Iterator[str]:
    """Compare what all nodes would take of each quota with what others leave of it."""
    groups: dict[tuple[str, str], list[Need]] = {}
    for need in wanted:
        groups.setdefault(quota_group(need.type, need.market), []).append(need)
    others = _others_vcpus(cloud)
    for group, members in groups.items():
        code, limit = _quota(cloud, *group)
        needed = sum(need.max * found.machines[need.type].vcpus for need in members)
        free = limit - others.get(group, 0)
        told = f"{needed} of {free:g} vCPUs ({code})" if limit >= 0 else "not known"
        found.quotas |= {need.name: told for need in members}
        if limit >= 0 and needed > free:
            yield (
                f"quota: {', '.join(need.name for need in members)} may need {needed} vCPUs of {group[0]} "
                f"{group[1]} machines, and {free:g} of {limit:g} are free: lower `max`, or ask for more with "
                f"`aws service-quotas request-service-quota-increase --region {cloud.region} "
                f"--service-code ec2 --quota-code {code} --desired-value {needed + limit - free:g}`"
            )


def quota_group(type_: str, market: str) -> tuple[str, str]:
    """Tell which quota a machine counts against, and its market."""
    family = type_.partition(".")[0]
    letters = re.match(r"[a-z]+", family)
    letter = letters[0] if letters else family
    if letter in STANDARD:
        return "standard", market
    if letter in GRAPHICS:
        return "G and VT", market
    if letter == "p" and market == "spot":
        generation = family[:2].upper()
        return ("P4, P3 and P2" if generation in ("P2", "P3", "P4") else generation), market
    return letter.upper(), market


def _quota(cloud: Cloud, group: str, market: str) -> tuple[str, float]:
    """Ask for a quota: its code, and how many vCPUs it allows; a negative number where AWS does not tell."""
    quotas = cloud.client("service-quotas")
    code = QUOTAS.get((group, market))
    try:
        if code is None:
            name = (
                f"All {group} Spot Instance Requests" if market == "spot" else f"Running On-Demand {group} "
            )
            pages = quotas.get_paginator("list_service_quotas").paginate(ServiceCode="ec2")
            every = (each for page in pages for each in page["Quotas"])
            quota = next((each for each in every if each["QuotaName"].startswith(name)), None)
            return (quota["QuotaCode"], quota["Value"]) if quota else ("", -1)
        return code, quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
    except ClientError as error:
        if code_of(error) in ("AccessDeniedException", "NoSuchResourceException"):
            return code or "", -1
        raise


def _others_vcpus(cloud: Cloud) -> dict[tuple[str, str], int]:
    """Count the vCPUs that instances of this region which are not the stack's take of each quota."""
    filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    pages = cloud.ec2.get_paginator("describe_instances").paginate(Filters=filters)
    every = [each for page in pages for group in page["Reservations"] for each in group["Instances"]]
    others = [each for each in every if tags_of(each).get(TAG) != cloud.name]
    known = machines(cloud, sorted({each["InstanceType"] for each in others})) if others else {}
    taken: dict[tuple[str, str], int] = {}
    for each in others:
        group = quota_group(each["InstanceType"], each.get("InstanceLifecycle", ON_DEMAND))
        taken[group] = taken.get(group, 0) + known[each["InstanceType"]].vcpus
    return taken


def permission_problems(cloud: Cloud, stack: Stack, found: Survey) -> Iterator[str]:
    """Ask EC2, by dry runs, whether these credentials may do what has to be done; nothing is made."""
    tags = [{"ResourceType": kind, "Tags": tag_list({TAG: stack.stack})} for kind in ("instance", "volume")]
    for type_, market in sorted({(need.type, need.market) for need in needs(stack)}):
        arguments: dict[str, Any] = {"ImageId": found.image, "InstanceType": type_, "TagSpecifications": tags}
        if market == "spot":
            arguments["InstanceMarketOptions"] = {"MarketType": "spot"}
        if zones := found.zones[type_]:
            arguments["SubnetId"] = found.subnets[zones[0]]
        yield from _dry_run(cloud.ec2.run_instances, MinCount=1, MaxCount=1, **arguments)
    yield from _dry_run(cloud.ec2.create_security_group, GroupName=cloud.cluster, Description="dry run")


def _dry_run(call: Any, **arguments: object) -> Iterator[str]:
    try:
        call(DryRun=True, **arguments)
    except ClientError as error:
        if code_of(error) not in ("DryRunOperation", "InvalidGroup.Duplicate"):
            yield f"permission: {explain(error)}"
