"""What is asked before anything is paid for, with answers that botocore holds to AWS's own description."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from botocore.stub import ANY, Stubber  # type: ignore[import-untyped]

from infra import preflight
from infra.aws_cloud import Cloud
from infra.preflight import Machine, Need, Survey, quota_group
from infra.stack import Budget
from tests.infra.moto_aws import REGION, STACK, set_environment

L4 = Machine(
    type="g6.xlarge", vcpus=4, memory_mib=16384, gpus=1, gpu="L4", architecture="x86_64", markets=("spot",)
)


@cache
def session() -> Any:
    """One for all tests, because it reads what it knows of EC2 for a while."""
    return boto3.Session(aws_access_key_id="testing", aws_secret_access_key="testing")


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[dict[str, Stubber]]:
    """Clients that answer what they are told to, once, and nothing else."""
    set_environment(monkeypatch, tmp_path)
    stubs: dict[str, Stubber] = {}

    def client(cloud: Cloud, service: str, region: str | None = None) -> Any:
        if service not in stubs:
            stubs[service] = Stubber(session().client(service, region_name=region or cloud.region))
            stubs[service].activate()
        return stubs[service].client

    monkeypatch.setattr(Cloud, "client", client)
    yield stubs
    for stub in stubs.values():
        stub.assert_no_pending_responses()


@pytest.fixture
def cloud(stubs: dict[str, Stubber]) -> Cloud:
    """AWS as those clients have it."""
    cloud = Cloud("demo", REGION)
    for service in ("service-quotas", "pricing", "ssm"):
        cloud.client(service)
    return cloud


def offer(usd: str, unit: str = "Hrs") -> str:
    """A product of the price list, as AWS writes it."""
    dimension = {"unit": unit, "pricePerUnit": {"USD": usd}, "beginRange": "0", "endRange": "Inf"}
    terms = {"OnDemand": {"SKU.TERM": {"priceDimensions": {"SKU.TERM.RATE": dimension}}}}
    return json.dumps({"product": {"productFamily": "Compute Instance"}, "terms": terms})


def test_prices_are_those_of_plain_linux_in_the_region(cloud: Cloud, stubs: dict[str, Stubber]) -> None:
    asked = {"ServiceCode": "AmazonEC2", "Filters": ANY}
    stubs["pricing"].add_response("get_products", {"PriceList": [offer("0.8048000000")]}, asked)
    stubs["pricing"].add_response("get_products", {"PriceList": []}, asked)
    assert preflight.on_demand_prices(cloud, ["g6.xlarge", "x9.huge"]) == {"g6.xlarge": pytest.approx(0.8048)}


def test_spot_prices_are_those_of_now_by_zone(cloud: Cloud, stubs: dict[str, Stubber]) -> None:
    history = [
        {"AvailabilityZone": "us-west-2a", "InstanceType": "g6.xlarge", "SpotPrice": "0.3"},
        {"AvailabilityZone": "us-west-2b", "InstanceType": "g6.xlarge", "SpotPrice": "0.25"},
    ]
    asked = {"InstanceTypes": ["g6.xlarge"], "ProductDescriptions": ["Linux/UNIX"], "StartTime": ANY}
    stubs["ec2"].add_response("describe_spot_price_history", {"SpotPriceHistory": history}, asked)
    prices = preflight.spot_prices(cloud, ["g6.xlarge"])
    assert prices == {"g6.xlarge": {"us-west-2a": 0.3, "us-west-2b": 0.25}}
    found = Survey(image="", spot_usd=prices, on_demand_usd={"g6.xlarge": 0.8})
    assert found.price("g6.xlarge", "on-demand") == 0.8
    assert found.price("g6.xlarge", "spot", "us-west-2b") == 0.25
    assert found.price("g6.xlarge", "spot") == 0.3  # the dearest, where no zone is chosen


def test_the_image_is_the_newest_of_the_public_list(cloud: Cloud, stubs: dict[str, Stubber]) -> None:
    answer = {"Parameter": {"Name": preflight.IMAGE, "Value": "ami-0123456789abcdef0"}}
    stubs["ssm"].add_response("get_parameter", answer, {"Name": preflight.IMAGE})
    assert preflight.newest_image(cloud) == "ami-0123456789abcdef0"


@pytest.mark.parametrize(
    ("type_", "market", "group"),
    [
        ("m7i.large", "on-demand", ("standard", "on-demand")),
        ("im4gn.large", "on-demand", ("standard", "on-demand")),
        ("g6e.xlarge", "spot", ("G and VT", "spot")),
        ("gr6.4xlarge", "on-demand", ("G and VT", "on-demand")),
        ("vt1.3xlarge", "spot", ("G and VT", "spot")),
        ("p4d.24xlarge", "spot", ("P4, P3 and P2", "spot")),
        ("p5en.48xlarge", "spot", ("P5", "spot")),
        ("p5.4xlarge", "on-demand", ("P", "on-demand")),
        ("trn1.2xlarge", "on-demand", ("TRN", "on-demand")),
    ],
)
def test_a_machine_counts_against_the_quota_of_its_letters(
    type_: str, market: str, group: tuple[str, str]
) -> None:
    assert quota_group(type_, market) == group


def test_no_quota_is_too_little(cloud: Cloud, stubs: dict[str, Stubber]) -> None:
    """AWS starts accounts with none for spot machines that have a GPU."""
    asked = {"ServiceCode": "ec2", "QuotaCode": "L-3819A6DF"}
    stubs["service-quotas"].add_response("get_service_quota", {"Quota": {"Value": 0.0}}, asked)
    stubs["ec2"].add_response("describe_instances", {"Reservations": []})
    found = Survey(image="", machines={"g6.xlarge": L4})
    (problem,) = preflight._quota_problems(
        cloud, [Need(name="l4", type="g6.xlarge", market="spot", max=4)], found
    )
    assert "l4 may need 16 vCPUs of G and VT spot machines, and 0 of 0 are free" in problem
    assert "--quota-code L-3819A6DF --desired-value 16" in problem


def test_a_quota_without_a_known_code_is_found_by_its_name(cloud: Cloud, stubs: dict[str, Stubber]) -> None:
    stub = stubs["service-quotas"]
    first = {"Quotas": [{"QuotaName": "All P4, P3 and P2 Spot Instance Requests"}], "NextToken": "more"}
    second = {
        "Quotas": [{"QuotaName": "All P5 Spot Instance Requests", "QuotaCode": "L-C4BD4855", "Value": 192.0}]
    }
    stub.add_response("list_service_quotas", first, {"ServiceCode": "ec2"})
    stub.add_response("list_service_quotas", second, {"ServiceCode": "ec2", "NextToken": "more"})
    assert preflight._quota(cloud, "P5", "spot") == ("L-C4BD4855", 192.0)


def test_a_quota_that_may_not_be_read_stops_nobody(cloud: Cloud, stubs: dict[str, Stubber]) -> None:
    stubs["service-quotas"].add_client_error("get_service_quota", "AccessDeniedException")
    stubs["ec2"].add_response("describe_instances", {"Reservations": []})
    found = Survey(image="", machines={"g6.xlarge": L4})
    needs = [Need(name="l4", type="g6.xlarge", market="spot", max=4)]
    assert list(preflight._quota_problems(cloud, needs, found)) == []
    assert found.quotas == {"l4": "not known"}


def test_a_price_that_may_not_be_read_stops_whoever_has_a_budget(
    cloud: Cloud, stubs: dict[str, Stubber]
) -> None:
    message = "User: u is not authorized to perform: pricing:GetProducts"
    stubs["pricing"].add_client_error("get_products", "AccessDeniedException", message)
    found = Survey(image="")
    (problem,) = preflight._price_problems(cloud, ["g6.xlarge"], found)
    assert "the action is pricing:GetProducts" in problem
    (budget,) = preflight.budget_problems(STACK, found)
    assert "the price of g6.xlarge, m7i.large is not known" in budget


def test_the_budget_bounds_the_hour_in_which_all_nodes_run_at_the_price_on_demand() -> None:
    """A spot machine's price may rise to that of the same machine on demand."""
    found = Survey(
        image="",
        on_demand_usd={"m7i.large": 0.1, "g6.xlarge": 0.8},
        spot_usd={"g6.xlarge": {"us-west-2a": 0.2}},
    )
    assert preflight.worst_usd_per_hour(STACK, found) == pytest.approx(0.1 + (4 + 2) * 0.8)
    exactly = replace(STACK, budget=Budget(max_hourly_usd=4.91))
    assert list(preflight.budget_problems(exactly, found)) == []
    assert list(preflight.budget_problems(replace(STACK, budget=Budget(max_hourly_usd=4.89)), found))


def test_a_fraction_of_a_gpu_is_none() -> None:
    described = {
        "InstanceType": "g6f.large",
        "VCpuInfo": {"DefaultVCpus": 2},
        "MemoryInfo": {"SizeInMiB": 8192},
        "ProcessorInfo": {"SupportedArchitectures": ["x86_64"]},
        "SupportedUsageClasses": ["on-demand", "spot"],
        "GpuInfo": {"Gpus": [{"Name": "L4", "Count": 0}]},
    }
    machine = preflight._machine(described)
    assert (machine.gpus, machine.gpu) == (0, "")
