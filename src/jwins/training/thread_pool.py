"""Some threads that share jobs: this one, and others that wait in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["ThreadPool"]

J = TypeVar("J")


class ThreadPool:
    """Does jobs in any order on up to so many threads, each with one of torch's intra-op threads.

    The calling thread is worker 0 and takes jobs like the others: handing a job to another thread costs more
    than many a job does, so only whole workers are started, and each takes the next job until there is none.

    Args:
        threads: how many, with the calling one.
        name: of the other threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads = threads
        self._name = name
        self._pool: ThreadPoolExecutor | None = None

    def run(self, jobs: Sequence[J], work: Callable[[int, J], None], threads: int | None = None) -> None:
        """Do every job; of several failures, the one of the first job is raised.

        After a failure, Ctrl-C included, every worker ends with the job at hand.

        Args:
            jobs: what to do.
            work: called with the number of the worker and the job.
            threads: at most so many; None for all.
        """
        torch.set_num_threads(1)
        workers = min(self.threads if threads is None else threads, len(jobs))
        if workers <= 1:
            for job in jobs:
                work(0, job)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads - 1, self._name)
        counter = itertools.count()
        failures: dict[int, BaseException] = {}

        def drain(worker: int) -> None:
            torch.set_num_threads(1)
            while not failures and (i := next(counter)) < len(jobs):
                try:
                    work(worker, jobs[i])
                except BaseException as error:
                    failures[i] = error

        futures: list[Future[None]] = [self._pool.submit(drain, worker) for worker in range(1, workers)]
        try:
            drain(0)
            wait(futures)
        except BaseException as error:  # between two jobs
            failures[len(jobs)] = error
            wait(futures)
        if failures:
            raise failures[min(failures)]

    def close(self) -> None:
        """End the threads; the next ``run`` starts new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
