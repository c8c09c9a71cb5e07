"""What a cluster file shows before there is a cloud: machine types as the clouds' catalogues have them."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import moto.ec2
import pytest

from infra.local import PROJECT
from infra.placeholders import MACHINES, machines
from infra.stack import StackError, Workers, load


def test_the_table_is_what_amazon_says_of_its_machines() -> None:
    """Of the copy of DescribeInstanceTypes that moto carries."""
    catalogue = Path(moto.ec2.__file__).parent / "resources" / "instance_types.json.gz"
    said = json.loads(gzip.decompress(catalogue.read_bytes()))
    known = {name: machine for name, machine in MACHINES.items() if "." in name}
    assert len(known) > 10
    for name, machine in known.items():
        gpus = said[name].get("GpuInfo", {}).get("Gpus", [])
        assert machine.cpus == said[name]["VCpuInfo"]["DefaultVCpus"], name
        assert machine.gpus == sum(gpu["Count"] for gpu in gpus), name
        assert machine.accelerator == (gpus[0]["Name"] if gpus else ""), name


def test_other_machine_types_are_described_in_the_stack() -> None:
    stack = load(PROJECT / "infra" / "stack.example.yaml")
    rare = Workers(name="rare", type="u-6tb1.metal", max=1)
    with pytest.raises(
        StackError, match=r"workers.rare: 'u-6tb1.metal' is not among .* resources: {CPU: 8, GPU: 1}"
    ):
        machines(replace(stack, workers=(rare,)))
    described = replace(rare, resources={"CPU": 448})
    assert machines(replace(stack, workers=(described,)))["u-6tb1.metal"].cpus == 448


@pytest.mark.parametrize(
    ("resources", "accelerator"), [({"GPU": 2}, "T4"), ({"GPU": 2, "accelerator_type:V100": 1}, "V100")]
)
def test_a_gpu_that_is_attached_is_named_in_the_stack(resources: dict[str, float], accelerator: str) -> None:
    stack = load(PROJECT / "infra" / "examples" / "gcp.stack.yaml")
    old = Workers(name="old", type="n1-standard-8", max=1, resources=resources)
    machine = machines(replace(stack, workers=(old,)))["n1-standard-8"]
    assert (machine.cpus, machine.gpus, machine.accelerator) == (8, 2, accelerator)
