"""Who gets the next free slot."""

from collections.abc import Sequence

import pytest
import torch

from gdl_ray.turns import LONG, Job, Turns


def job_of(n: int, client: str = "", steps: int = 1) -> Job:
    return Job(torch.arange(n), torch.full((n,), -1), {}, steps, client)


def queue_of(*jobs: Job) -> Turns:
    turns = Turns()
    for job in jobs:
        turns.add(job)
    return turns


def take(turns: Turns, room: int, held: Sequence[Job] = ()) -> list[tuple[Job, range]]:
    return turns.take(room + len(held), held)


def test_a_job_alone_gets_all_slots_in_order() -> None:
    job = job_of(10)
    turns = queue_of(job)
    assert take(turns, 4) == [(job, range(4))]
    assert take(turns, 64) == [(job, range(4, 10))]
    assert take(turns, 64) == []


def test_the_small_job_of_a_client_goes_before_the_large() -> None:
    large, small = job_of(1000), job_of(4)
    turns = queue_of(large, small)
    assert dict(take(turns, 8)) == {small: range(4), large: range(4)}
    assert dict(take(turns, 8)) == {large: range(4, 12)}


def test_jobs_of_a_size_go_as_they_came() -> None:
    jobs = [job_of(4) for _ in range(100)]
    turns = queue_of(*jobs)
    assert [take(turns, 4) for _ in jobs] == [[(job, range(4))] for job in jobs]


def test_a_job_ends_no_later_than_if_all_shared_alike() -> None:
    """Against a simulation that gives every job of the client a step in turn."""
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.rand(200, generator=generator).pow(-1.5) * 2).long().clamp(1, 300).tolist()
    arrivals = torch.randint(2000, (200,), generator=generator).sort().values.tolist()
    turns, left = Turns(), dict[Job, int]()
    ended: dict[Job, int] = {}
    shared: dict[Job, float] = {}
    waiting = list(zip(arrivals, sizes, strict=True))
    for now in range(20_000):
        while waiting and waiting[0][0] <= now:
            job = job_of(waiting.pop(0)[1])
            turns.add(job)
            left[job] = len(job.seeds)
            shared[job] = 0.0
        for job, _ in take(turns, 1):
            if not job.missing:
                ended[job] = now
        # As much work as the queue gave away, an equal part to each job that is not done.
        alike = [job for job, size in left.items() if shared[job] < size]
        for job in alike:
            shared[job] += 1 / len(alike)
            if shared[job] >= left[job] - 1e-9:
                shared[job] = left[job]
                assert job in ended, f"a job of {left[job]} has not ended by {now}"
    assert len(ended) == 200


def test_clients_take_turns_however_many_jobs_they_have() -> None:
    busy = [job_of(1, "busy") for _ in range(100)]
    other = job_of(5, "other")
    turns = queue_of(*busy, other)
    assert dict(take(turns, 8)) == {**{job: range(1) for job in busy[:4]}, other: range(4)}


def test_the_turn_goes_on_where_it_was() -> None:
    jobs = [job_of(2, client) for client in "abc"]
    turns = queue_of(*jobs)
    order = [take(turns, 1)[0] for _ in range(6)]
    assert order == [(job, range(i, i + 1)) for i in range(2) for job in jobs]


def test_what_waits_is_counted_in_samples_and_steps() -> None:
    first, second = job_of(10, steps=3), job_of(5, "other", steps=100)
    turns = queue_of(first, second)
    assert (turns.samples, turns.steps) == (15, 530)
    take(turns, 4)
    assert (turns.samples, turns.steps) == (11, 7 * 3 + 4 * 100)
    turns.remove(second)
    assert (turns.samples, turns.steps) == (7, 21)
    assert turns.jobs() == [first]


def test_a_job_that_is_taken_out_gets_nothing_more() -> None:
    first, second = job_of(10, "first"), job_of(5, "second")
    turns = queue_of(first, second)
    take(turns, 4)
    for _ in range(2):  # once more does no harm
        turns.remove(first)
    assert take(turns, 64) == [(second, range(2, 5))]
    turns.remove(second)
    assert (turns.samples, turns.steps, turns.jobs()) == (0, 0, [])


def test_turns_are_charged_in_steps() -> None:
    slow, quick = job_of(64, "slow", steps=30), job_of(1000, "quick", steps=3)
    turns = queue_of(slow, quick)
    taken = dict(take(turns, 44))
    assert {job: len(numbers) for job, numbers in taken.items()} == {slow: 4, quick: 40}


def test_jobs_of_a_client_are_compared_by_their_steps() -> None:
    slow, quick = job_of(10, steps=30), job_of(50, steps=3)
    taken = dict(take(queue_of(slow, quick), 44))
    assert taken == {quick: range(44)}


def test_who_was_away_has_saved_nothing_up() -> None:
    first, second = job_of(1000, "first"), job_of(1000, "second")
    turns = queue_of(first)
    take(turns, 100)
    turns.add(second)
    assert {job: len(numbers) for job, numbers in take(turns, 20)} == {first: 10, second: 10}


def test_who_comes_and_goes_keeps_its_account() -> None:
    """A client who asks for a sample of 50 steps at a time, again and again, gets no more than its share."""
    turns = queue_of(job_of(1000, "quick", steps=1))
    given = {"slow": 0, "quick": 0}
    for _ in range(500):
        if not turns.waiting("slow"):
            turns.add(job_of(1, "slow", steps=50))
        ((job, _),) = take(turns, 1)
        given[job.client] += job.steps
    assert given["slow"] == pytest.approx(given["quick"], abs=50)


@pytest.mark.parametrize(
    "clients", [["new"] * 300, [f"new-{i}" for i in range(300)]], ids=["jobs", "clients"]
)
def test_a_train_of_newcomers_holds_nobody_up(clients: list[str]) -> None:
    old = job_of(1, clients[0], steps=50)
    turns = queue_of(old, job_of(1, clients[0]))
    for client in clients:
        turns.add(job_of(1, client))
        take(turns, 1)
    assert old.admitted == 1


def test_a_client_leaves_an_eighth_of_the_slots_to_others_if_its_samples_are_long() -> None:
    long = [job_of(64, "long", steps=LONG + 1) for _ in range(2)]
    turns = queue_of(*long)
    held = [job for job, numbers in turns.take(64, []) for _ in numbers]
    assert len(held) == 56
    assert turns.take(64, held) == []
    short, others = job_of(1, "long"), job_of(20, "other", steps=1000)
    turns.add(others)
    turns.add(short)
    assert dict(turns.take(64, held)) == {short: range(1), others: range(7)}


def test_samples_that_are_not_long_may_take_all_slots() -> None:
    job = job_of(100, steps=LONG)
    assert queue_of(job).take(64, []) == [(job, range(64))]


def test_rivals_are_those_who_wait() -> None:
    gone = job_of(1, "gone")
    turns = queue_of(gone, job_of(3, "a"), job_of(4, "a"), job_of(2, "b"))
    turns.remove(gone)
    assert [turns.rivals(name) for name in ("a", "b", "c")] == [(2, 3), (2, 2), (3, 1)]
    assert [turns.waiting(name) for name in ("a", "b", "gone", "c")] == [7, 2, 0, 0]
