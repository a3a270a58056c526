"""Jobs on a Ray cluster that runs elsewhere: submitted, followed and stopped over Ray's Jobs API (HTTP).

The driver runs on the cluster's head and writes its records as JSON lines, one event or round each; whoever follows
the job reads them from its log. What is no record (an error, a word of Ray's) stays a line of text.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.job_submission import JobStatus, JobSubmissionClient

from xcloud.errors import ConfigError, PlacementError

__all__ = ["JobEnd", "JobService", "JobState", "Submission", "record_of"]

EXCLUDES = (
    ".git",
    ".venv",
    ".venv-*",
    "runs",
    "__pycache__",
    "*.pyc",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
)
"""What a working directory never needs on the cluster."""
STOP_WAIT_S = 3600
"""How long Ray lets a stopped driver finish its round and its checkpoint before it kills it."""
RUN_DIR, JOB, COMMAND = "xcloud.run_dir", "xcloud.job", "xcloud.command"
POLL_S = 0.5
RECONNECTS = 20

ENDED = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}


@dataclass(frozen=True)
class Submission:
    """What is submitted.

    Attributes:
        id: unique on the cluster.
        working_dir: packed and sent along; relative paths of the job lie in it.
        arguments: of `xcloud train`.
        run_dir: the run folder, on the head; `~` is the home folder there.
        job: the job as YAML, for those who follow it without its file.
        ship: send this machine's xcloud along, because the cluster has none, or another version.
        environment: variables of the driver.
    """

    id: str
    working_dir: Path
    arguments: Sequence[str]
    run_dir: str
    job: str
    ship: bool = False
    environment: Mapping[str, str] | None = None

    @staticmethod
    def new_id(name: str) -> str:
        """An id that tells the job's name and when it was submitted."""
        return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


@dataclass(frozen=True)
class JobState:
    """How a submitted job stands. `status` is Ray's word in small letters."""

    id: str
    name: str
    status: str
    run_dir: str | None
    started: float | None
    ended: float | None
    message: str


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: its driver's exit code (130: it was stopped), and Ray's words where there are some."""

    exit_code: int
    status: str
    message: str


class JobService:
    """The Jobs API of one cluster.

    Args:
        address: `http://HOST:PORT` of the dashboard; None: RAY_API_SERVER_ADDRESS, or the usual port of this machine.
        insecure: talk to another machine without TLS all the same.

    Raises:
        ConfigError: the address is none, or would send the token over a network in the clear.
        PlacementError: nobody answers there, or it refuses; says what to check.
    """

    def __init__(self, address: str | None = None, insecure: bool = False) -> None:
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
        _check_address(self.address, insecure)
        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of each package that it sends
        try:
            self._client = JobSubmissionClient(self.address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PlacementError(f"no Jobs API at {self.address} (--address): {_hint(error)}") from None

    def submit(self, what: Submission) -> None:
        """Pack the working directory and start the driver on the head.

        Raises:
            PlacementError: the cluster does not take it; says why.
        """
        command = ["python", "-m", "xcloud", "train", *what.arguments]
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **(what.environment or {})}
        runtime_env: dict[str, Any] = {
            "working_dir": str(what.working_dir),
            "excludes": list(EXCLUDES),
            "env_vars": environment,
        }
        if what.ship:
            runtime_env["py_modules"] = [str(Path(__file__).parents[1])]
        metadata = {RUN_DIR: what.run_dir, JOB: what.job, COMMAND: shlex.join(what.arguments)}
        try:
            self._client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=what.id,
                runtime_env=runtime_env,
                metadata=metadata,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PlacementError(f"job {what.id}: {self.address} does not take it: {_hint(error)}") from None

    def follow(self, job_id: str, tell: Callable[[str], None]) -> JobEnd:
        """Hand on each line of a job's log until the job ends. A connection that breaks is taken up again.

        Raises:
            PlacementError: there is no such job, or the cluster does not come back.
        """
        told, failures = _Told(tell), 0
        while True:
            try:
                asyncio.run(self._tail(job_id, told))
                info = self._info(job_id)
                if info.status in ENDED:
                    return _end_of(info)
                failures = 0
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                failures += 1
                if failures > RECONNECTS:
                    raise PlacementError(
                        f"job {job_id}: {self.address} does not answer any more: {_hint(error)}; the job may go on: "
                        f"xcloud logs {job_id}"
                    ) from None
            time.sleep(POLL_S)

    async def _tail(self, job_id: str, told: _Told) -> None:
        """The log from its beginning to its end, or to where the connection breaks."""
        count, rest = 0, ""
        async for chunk in self._client.tail_job_logs(job_id):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                told.line(count, line)
                count += 1
        if rest and self._info(job_id).status in ENDED:  # a last line without its end
            told.line(count, rest)

    def stop(self, job_id: str, wait: bool = True) -> JobState:
        """Have a job end after its round, with a checkpoint; Ray kills it if that takes longer than an hour.

        Raises:
            PlacementError: there is no such job.
        """
        info = self._info(job_id)
        if info.status not in ENDED:
            self._client.stop_job(job_id)
        while wait and self._info(job_id).status not in ENDED:
            time.sleep(POLL_S)
        return self.state(job_id)

    def state(self, job_id: str) -> JobState:
        """How a job stands.

        Raises:
            PlacementError: there is no such job.
        """
        return _state_of(self._info(job_id))

    def list(self) -> list[JobState]:
        """The cluster's xcloud jobs, newest first."""
        jobs = [_state_of(info) for info in self._client.list_jobs() if info.submission_id and info.metadata]
        return sorted((job for job in jobs if job.run_dir), key=lambda job: job.started or 0.0, reverse=True)

    def record(self, job_id: str) -> tuple[str, str]:
        """Run folder and job (YAML) of a job.

        Raises:
            PlacementError: there is no such job, or it is none of xcloud's.
        """
        metadata = self._info(job_id).metadata or {}
        if RUN_DIR not in metadata or JOB not in metadata:
            raise PlacementError(
                f"job {job_id}: {self.address} has it, but `xcloud submit` has not submitted it"
            )
        return metadata[RUN_DIR], metadata[JOB]

    def _info(self, job_id: str) -> Any:
        try:
            return self._client.get_job_info(job_id)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                known = [job.id for job in self.list()[:5]]
                raise PlacementError(
                    f"job {job_id}: {self.address} knows no such job; it knows {', '.join(known) or 'none of xcloud'}"
                ) from None
            raise


class _Told:
    """Hands each line on once, however often the log is read from its beginning."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._seen = tell, 0

    def line(self, number: int, text: str) -> None:
        """A line, by its number from 0."""
        if number >= self._seen:
            self._seen = number + 1
            self._tell(text)


def _state_of(info: Any) -> JobState:
    metadata = info.metadata or {}
    return JobState(
        id=info.submission_id,
        name=str(info.submission_id).rsplit("-", 3)[0],
        status=info.status.value.lower(),
        run_dir=metadata.get(RUN_DIR),
        started=info.start_time / 1000 if info.start_time else None,
        ended=info.end_time / 1000 if info.end_time else None,
        message=info.message or "",
    )


def _end_of(info: Any) -> JobEnd:
    if info.status == JobStatus.SUCCEEDED:
        code = 0
    elif info.status == JobStatus.STOPPED:
        code = 130
    else:
        code = info.driver_exit_code if info.driver_exit_code else 1
    return JobEnd(code, info.status.value.lower(), info.message or "")


def _check_address(address: str, insecure: bool) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--address {address!r}: expected the dashboard's URL, such as http://127.0.0.1:8265 (for `xcloud train`, "
            "--address is that of the cluster itself)"
        )
    if parts.scheme == "http" and not insecure and not _on_this_machine(parts.hostname):
        port = parts.port or 8265
        raise ConfigError(
            f"--address {address!r}: Ray's Jobs API has no TLS, and its token, with which anybody can run code on the cluster, would "
            f"cross the network in the clear; expected a tunnel (ssh -L {port}:127.0.0.1:{port} HEAD, then --address "
            f"http://127.0.0.1:{port}), an https:// proxy, or --insecure"
        )


def _on_this_machine(host: str) -> bool:
    try:
        return all(ipaddress.ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(host, None))
    except (OSError, ValueError):
        return False


def _hint(error: BaseException) -> str:
    """The error's first line, and what it most likely means."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    if "401" in str(error) or "403" in str(error) or "token" in str(error).lower():
        said += "; the cluster asks for its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    return said


def record_of(line: str) -> dict[str, Any] | None:
    """The record in a log line; None where it is text."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("kind"), str) else None
