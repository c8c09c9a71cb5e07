"""Who gets the next free slot."""

import torch

from gdl_ray.turns import Job, Turns


def job_of(n: int, client: str = "", steps: int = 1) -> Job:
    return Job(torch.arange(n), torch.full((n,), -1), {}, steps, client)


def queue_of(*jobs: Job) -> Turns:
    turns = Turns()
    for job in jobs:
        turns.add(job)
    return turns


def test_a_job_alone_gets_all_slots_in_order() -> None:
    job = job_of(10)
    turns = queue_of(job)
    assert turns.take(4) == [(job, range(4))]
    assert turns.take(64) == [(job, range(4, 10))]
    assert turns.take(64) == []


def test_jobs_of_a_client_take_turns() -> None:
    large, small = job_of(1000), job_of(4)
    turns = queue_of(large, small)
    assert dict(turns.take(8)) == {large: range(4), small: range(4)}
    assert dict(turns.take(8)) == {large: range(4, 12)}


def test_clients_take_turns_however_many_jobs_they_have() -> None:
    busy = [job_of(1, "busy") for _ in range(100)]
    other = job_of(5, "other")
    turns = queue_of(*busy, other)
    assert dict(turns.take(8)) == {**{job: range(1) for job in busy[:4]}, other: range(4)}


def test_the_turn_goes_on_where_it_was() -> None:
    jobs = [job_of(2, client) for client in "abc"]
    turns = queue_of(*jobs)
    order = [turns.take(1)[0] for _ in range(6)]
    assert order == [(job, range(i, i + 1)) for i in range(2) for job in jobs]


def test_what_waits_is_counted_in_samples_and_steps() -> None:
    first, second = job_of(10, steps=3), job_of(5, "other", steps=100)
    turns = queue_of(first, second)
    assert (turns.samples, turns.steps) == (15, 530)
    turns.take(4)
    assert (turns.samples, turns.steps) == (11, 324)
    turns.remove(second)
    assert (turns.samples, turns.steps) == (8, 24)
    assert turns.jobs() == [first]


def test_a_job_that_is_taken_out_gets_nothing_more() -> None:
    first, second = job_of(10), job_of(5)
    turns = queue_of(first, second)
    turns.take(4)
    for _ in range(2):  # once more does no harm
        turns.remove(first)
    assert turns.take(64) == [(second, range(2, 5))]
    turns.remove(second)
    assert (turns.samples, turns.steps, turns.jobs()) == (0, 0, [])
