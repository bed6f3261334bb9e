"""Where cells run: on this machine, on Ray, or as jobs of SLURM through submitit. Each is a library's, used as it is.

with executor("local", workers=2, ...) as submit:
    future = submit(job)      # has done() and result()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tailfin.errors import UserError
from tailfin.study.work import Job, run_job, stop


class Pending(Protocol):
    """A cell that was handed over."""

    def done(self) -> bool: ...

    def result(self) -> Any: ...


Submit = Callable[[Job], Pending]


@contextlib.contextmanager
def executor(name: str, *, workers: int, threads: int, resources: Mapping[str, Any], logs: Path) -> Iterator[Submit]:
    """How to hand a cell over; the end of the block waits for nothing but local cells, which it asks to stop."""
    makers = {"local": _local, "ray": _ray, "submitit": _submitit}
    with makers[name](workers, threads, dict(resources), logs) as submit:
        yield submit


@contextlib.contextmanager
def _local(workers: int, threads: int, resources: dict[str, Any], logs: Path) -> Iterator[Submit]:
    if resources:
        raise UserError("resources are for executor ray or submitit; a local cell has `threads`")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cell")
    try:
        yield lambda job: pool.submit(run_job, job)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        stop()
        raise
    finally:
        pool.shutdown()  # a cell that stops writes its resume point first


@contextlib.contextmanager
def _ray(workers: int, threads: int, resources: dict[str, Any], logs: Path) -> Iterator[Submit]:
    try:
        import ray
    except ImportError:
        raise UserError("executor ray needs Ray: pip install 'tailfin[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)  # RAY_ADDRESS names a cluster that runs already
    remote = ray.remote(**{"num_cpus": threads, "max_retries": 0, **resources})(run_job)
    try:
        yield lambda job: remote.remote(job).future()
    finally:
        if started:
            ray.shutdown()


@contextlib.contextmanager
def _submitit(workers: int, threads: int, resources: dict[str, Any], logs: Path) -> Iterator[Submit]:
    try:
        import submitit
    except ImportError:
        raise UserError("executor submitit needs submitit: pip install 'tailfin[slurm]'") from None
    cluster = resources.pop("cluster", None)  # none: SLURM where it is, else processes of this machine
    found = submitit.AutoExecutor(folder=logs, cluster=cluster)
    found.update_parameters(**{"cpus_per_task": threads, "name": "tailfin", "timeout_min": 24 * 60, **resources})
    yield lambda job: found.submit(run_job, job)
