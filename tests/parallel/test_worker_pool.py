"""The pool of worker processes that the parallel tests run on."""

import os
import time

import pytest
import torch
from torch import distributed

from tests.support.worker_pool import WorkerFailure


def sum_of_ranks(scale: float) -> tuple[int, int, int, float]:
    value = torch.tensor([scale * (distributed.get_rank() + 1)])
    distributed.all_reduce(value)
    return os.getpid(), distributed.get_rank(), distributed.get_world_size(), value.item()


def fail_on_rank_one(others_wait: bool) -> None:
    if distributed.get_rank() == 1:
        raise KeyError("the missing expert")
    if others_wait:
        distributed.barrier()


def threads_and_tensor() -> tuple[int, torch.Tensor]:
    return torch.get_num_threads(), torch.full((3,), float(distributed.get_rank()))


def sleep_on_rank_one() -> None:
    if distributed.get_rank() == 1:
        time.sleep(600)


def exit_on_rank_one() -> None:
    if distributed.get_rank() == 1:
        os._exit(7)


def test_all_reduce_over_two_ranks(workers):
    answers = workers(2)(sum_of_ranks, 10.0)
    assert [answer[1:] for answer in answers] == [(0, 2, 30.0), (1, 2, 30.0)]


def test_the_same_processes_serve_again_also_in_another_group(workers):
    first = [answer[0] for answer in workers(2)(sum_of_ranks, 1.0)]
    again = [answer[0] for answer in workers(2)(sum_of_ranks, 1.0)]
    alone = workers(1)(sum_of_ranks, 1.0)[0]
    assert first == again and len(set(first)) == 2 and os.getpid() not in first
    assert alone == (first[0], 0, 1, 1.0)


def test_workers_have_one_thread_and_return_tensors(workers):
    answers = workers(2)(threads_and_tensor)
    assert [answer[0] for answer in answers] == [1, 1]
    assert torch.equal(answers[1][1], torch.ones(3))


@pytest.mark.parametrize("others_wait", [False, True])
def test_an_exception_reaches_the_test_with_its_traceback(workers, others_wait):
    with pytest.raises(WorkerFailure, match=r"(?s)rank 1 of 2:.*fail_on_rank_one.*KeyError: 'the missing expert'"):
        workers(2)(fail_on_rank_one, others_wait)
    assert workers(2)(sum_of_ranks, 1.0)[0][-1] == 3.0


def test_a_rank_that_hangs_times_out_and_the_pool_recovers(workers):
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[1\] within 0.5 s.*sleep_on_rank_one"):
        workers(2, timeout=0.5)(sleep_on_rank_one)
    assert workers(2)(sum_of_ranks, 1.0)[0][-1] == 3.0


def test_a_process_that_dies_is_reported_and_replaced(workers):
    with pytest.raises(WorkerFailure, match="exit code 7"):
        workers(2)(exit_on_rank_one)
    assert workers(2)(sum_of_ranks, 1.0)[1][-1] == 3.0


def test_what_cannot_be_pickled_is_refused_before_it_is_sent(workers):
    with pytest.raises(Exception, match=r"pickle|local object"):
        workers(2)(lambda: None)
