"""Ending a round early: the machines of a pool are about to be taken away, and what it has trained so far shall count.

One rank is told at a time of its own choosing, but a step is taken by all ranks or by none. So each step begins with a
reduction of everybody's flag that is waited for at the next step: the ranks see the same answer, and it travels while they compute.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Halt"]


class Halt:
    """Whether the ranks of a pool stop before the next step.

    Args:
        world: ranks of the pool; making one is collective.
    """

    def __init__(self, world: int) -> None:
        self._told = threading.Event()
        # On the host, beside whatever the ranks reduce their gradients with.
        self._group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def tell(self) -> None:
        """Have the pool stop; from any thread of any rank."""
        self._told.set()

    def agreed(self) -> bool:
        """Called by every rank before each step; the same answer on all of them. It takes a step from the word to the stop."""
        if self._group is None:
            return self._told.is_set()
        ended = self._waited()
        flag = torch.tensor([float(self._told.is_set())])
        self._asked = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
        return ended

    def close(self) -> None:
        """End of a round: nothing stays on the way."""
        self._waited()

    def _waited(self) -> bool:
        if self._asked is None:
            return False
        (work, flag), self._asked = self._asked, None
        work.wait()
        return bool(flag)
