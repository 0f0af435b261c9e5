"""Pool of threads that share jobs: the calling thread, and others that wait in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

J = TypeVar("J")
R = TypeVar("R")


class ThreadPool:
    """Pool that does jobs in any order on several threads, each with one of torch's intra-op threads.

    The calling thread is worker 0 and takes jobs like the others. Passing a single job to another thread can
    take longer than the job. So whole workers are started, and each takes the next job until there is none.

    Args:
        threads: number of threads, including the calling one.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads = threads
        self._name = name
        self._pool: ThreadPoolExecutor | None = None

    def run(self, jobs: Sequence[J], work: Callable[[int, J], None], threads: int | None = None) -> None:
        """Do every job; if several fail, raise the error of the first one.

        After a failure or Ctrl-C every worker finishes its current job and stops.

        Args:
            jobs: the jobs.
            work: called with the number of the worker and the job.
            threads: largest number of threads; None for all.
        """
        torch.set_num_threads(1)
        workers = min(self.threads if threads is None else threads, len(jobs))
        if workers <= 1:
            for job in jobs:
                work(0, job)
            return
        pool = self._executor()
        counter = itertools.count()
        failures: dict[int, BaseException] = {}

        def drain(worker: int) -> None:
            torch.set_num_threads(1)
            while not failures and (i := next(counter)) < len(jobs):
                try:
                    work(worker, jobs[i])
                except BaseException as error:
                    failures[i] = error

        futures: list[Future[None]] = [pool.submit(drain, worker) for worker in range(1, workers)]
        try:
            drain(0)
            wait(futures)
        except BaseException as error:  # between two jobs
            failures[len(jobs)] = error
            wait(futures)
        if failures:
            raise failures[min(failures)]

    def submit(self, work: Callable[[J], R], job: J) -> Callable[[], R]:
        """Begin a job on another thread, of which there must be one.

        Returns:
            Function that waits for the result, or does the job itself if no thread has begun it.
        """
        future = self._executor().submit(work, job)
        return lambda: work(job) if future.cancel() else future.result()

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads - 1, self._name)
        return self._pool

    def close(self) -> None:
        """Stop the threads; the next ``run`` starts new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
