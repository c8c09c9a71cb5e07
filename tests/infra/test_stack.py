"""The stack file: what it says is what is read, and whatever else it says is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.gcp_foundation import account_of
from infra.local import PROJECT
from infra.stack import Stack, StackError, Workers, load

EXAMPLE = Path(__file__).parents[2] / "infra" / "stack.example.yaml"


def changed(folder: Path, path: str, value: Any) -> Path:
    """Write the example with one key changed, given as `workers.0.max`; None takes the key away."""
    content = yaml.safe_load(EXAMPLE.read_text())
    *parents, last = path.split(".")
    place: Any = content
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    file = folder / "stack.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_the_example_is_read_as_it_is_written() -> None:
    stack = load(EXAMPLE)
    assert (stack.stack, stack.cloud, stack.region, stack.zones) == ("demo", "aws", "us-west-2", "auto")
    assert (stack.ttl_hours, stack.budget.max_hourly_usd, stack.image) == (12, 10, "")
    assert (stack.access.mode, stack.access.cidr, stack.storage.bucket) == ("ssh", "auto", "auto")
    spot = Workers(name="l4-spot", type="g6.2xlarge", market="spot", min=0, max=4, priority=10)
    assert stack.workers[0] == spot
    assert (stack.workers[1].market, stack.workers[1].priority) == ("on-demand", 0)


def test_a_local_stack_needs_a_name_alone(tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text("{stack: mine, cloud: local}")
    assert load(file) == Stack(stack="mine", cloud="local")


def test_lists_and_numbers_are_read_as_the_stack_holds_them(tmp_path: Path) -> None:
    assert load(changed(tmp_path, "zones", ["us-west-2a"])).zones == ("us-west-2a",)
    assert load(changed(tmp_path, "workers.0.resources", {"CPU": 7})).workers[0].resources == {"CPU": 7}
    assert load(changed(tmp_path, "access.cidr", "203.0.113.7/32")).access.cidr == "203.0.113.7/32"


WRONG: list[tuple[str, Any, str]] = [
    ("regin", "us-west-2", "regin: unknown key; did you mean region?"),
    ("workers.0.piority", 3, "workers[0].piority: unknown key; did you mean priority?"),
    ("head.qqq", 3, "head.qqq: unknown key; choose from type"),
    ("stack", "My_Stack", "stack: 'My_Stack' must be 1 to 30 lowercase letters"),
    ("stack", "a-", "stack: 'a-' must be"),
    ("stack", None, "stack is missing"),
    ("region", None, "region is missing, which cloud: aws needs"),
    ("cloud", "awss", "cloud: 'awss' must be local or aws or gcp; did you mean aws?"),
    ("ttl_hours", "12", "ttl_hours: '12' must be a number of hours from 0.5 to 720"),
    ("ttl_hours", True, "ttl_hours: True must be a number of hours"),
    ("ttl_hours", float("nan"), "ttl_hours: nan must be a number of hours"),
    ("access.cidr", "0.0.0.0/0", "access.cidr: '0.0.0.0/0' lets (nearly) everyone in"),
    ("access.cidr", 7, "access.cidr: 7 must be auto, or addresses"),
    ("access.mode", "sssh", "access.mode: 'sssh' must be ssh or ssm; did you mean ssh?"),
    ("zones", "us-west-2a", "zones: 'us-west-2a' must be auto, or a list"),
    ("zones", ["eu-west-1a"], "zones: 'eu-west-1a' is not in region us-west-2"),
    ("workers", {"a": 1}, "workers: {'a': 1} must be a list"),
    ("workers", [], "workers is missing"),
    ("workers.1.max", 0, "workers[1].max: 0 must be a whole number of nodes from 1"),
    ("workers.1.max", 1.5, "workers[1].max: 1.5 must be a whole number"),
    ("workers.1.min", 3, "workers.l4.min: 3 is more than its max of 2"),
    ("workers.1.name", "l4-spot", "workers: 'l4-spot' is the name of 2 kinds"),
    ("workers.1.name", "head", "workers: 'head' is the name of the head"),
    ("workers.1.market", "sport", "workers[1].market: 'sport' must be spot or on-demand; did you mean spot?"),
    ("workers.1.resources", {"CPU": "8"}, "has CPU = '8', which must be a whole number of units"),
    ("workers.1.type", "g2-standard-8", "workers.l4.type: 'g2-standard-8' is no machine type of cloud: aws"),
    ("project", "my-project", "project: 'my-project' means nothing on AWS"),
    ("budget.max_hourly_usd", 0, "budget.max_hourly_usd: 0 must be a number of dollars from 0.01"),
    ("image", "a b", "image: 'a b' must be null, or the name of an image"),
    ("owner", "", "owner: '' must be a name or address"),
    ("storage.bucket", "No", "storage.bucket: 'No' must be auto, or the name of a bucket"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_what_is_wrong_is_named_with_its_cure(path: str, value: Any, message: str, tmp_path: Path) -> None:
    file = changed(tmp_path, path, value)
    with pytest.raises(StackError) as refused:
        load(file)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{file}: ")
    assert message in line


def test_googles_accounts_bear_the_name_and_have_30_letters_at_most(tmp_path: Path) -> None:
    example = (PROJECT / "infra" / "examples" / "gcp.stack.yaml").read_text()
    file = tmp_path / "stack.yaml"
    for length, accepted in ((19, True), (20, False)):
        file.write_text(example.replace("stack: demo", f"stack: {'n' * length}"))
        if accepted:
            assert len(account_of(load(file), "worker").partition("@")[0]) == 30
        else:
            with pytest.raises(StackError, match="must have 19 characters at most"):
                load(file)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text("{stack: 1, clud: aws, workers: [{name: a}], budget: 10}")
    with pytest.raises(StackError) as refused:
        load(file)
    keys = [
        line.removeprefix(f"{file}: ").split(":")[0].split(" ")[0] for line in str(refused.value).splitlines()
    ]
    assert sorted(keys) == ["budget", "cloud", "clud", "stack", "workers[0].max", "workers[0].type"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stack: a\nstack: b\n", "key 'stack' twice"),
        ("stack: [\n", "stack.yaml: "),
        ("", "must be a mapping with stack"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_what_is_no_stack_file_is_refused_in_a_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(text)
    with pytest.raises(StackError, match=message) as refused:
        load(file)
    assert "\n" not in str(refused.value)


def test_a_missing_file_points_to_the_example(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"stack\.example\.yaml"):
        load(tmp_path / "none.yaml")


def test_google_needs_a_project_and_has_no_session_manager(tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(
        "{stack: a, cloud: gcp, region: us-central1, owner: me, access: {mode: ssm},"
        " head: {type: e2-standard-4}, workers: [{name: l4, type: g2-standard-8, max: 1}]}"
    )
    with pytest.raises(StackError) as refused:
        load(file)
    assert "project is missing" in str(refused.value)
    assert "access.mode: 'ssm' is AWS's" in str(refused.value)
