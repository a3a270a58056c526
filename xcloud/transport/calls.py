"""Calls to actors as standard futures, with their errors in xcloud's own words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from xcloud.errors import RegionError, XCloudError

__all__ = ["call", "gather", "in_own_words", "later"]

T = TypeVar("T")


def call(peer: str, reference: Any, parse: Callable[[Any], T]) -> Future[T]:
    """A future of an actor call's parsed result.

    Args:
        peer: who is called, for errors.
        reference: the call's ObjectRef.
        parse: turns the raw result into a message.
    """
    return later(peer, lambda: parse(ray.get(reference)))


def later(peer: str, work: Callable[[], T]) -> Future[T]:
    """A future of `work`, done in a thread of its own, with its errors in xcloud's words; `peer` as in `call`."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def wait() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed on to whoever waits for the future
            result.set_exception(in_own_words(peer, error))

    # A thread for each call: Ray's own `ObjectRef.future()` takes three times as long to answer.
    threading.Thread(target=wait, name=f"call to {peer}", daemon=True).start()
    return result


def gather(references: Sequence[Any]) -> list[Any]:
    """Results in order; the first failure is raised at once, not after the slowest peer.

    Raises:
        ray.exceptions.RayError: as the failed call raised it.
    """
    waiting = list(references)
    while len(waiting) > 1:
        done, waiting = ray.wait(waiting, num_returns=1)
        ray.get(done)
    return ray.get(list(references)) if references else []


def in_own_words(peer: str, error: BaseException) -> BaseException:
    """An XCloudError raised in an actor comes back as itself; Ray's own become RegionError."""
    cause = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    if isinstance(cause, XCloudError) or not isinstance(error, RayError):
        return cause
    if isinstance(cause, RayActorError):
        said: RegionError = RegionError(peer, "its process is gone")
    else:
        lines = [line for line in str(cause).strip().splitlines() if line.strip()]
        said = RegionError(peer, lines[-1] if lines else type(cause).__name__)
    said.__cause__ = error  # the remote traceback, for XCLOUD_TRACEBACK=1
    return said
