"""The link emulator: each packet's fate by the numbers, and TCP through real TUN devices where this machine allows it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.wan import EmulatedCables, why_not
from benchmarks.wan_link import Link, Shape

needs_root = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def arrivals(link: Link) -> list[float]:
    return [due for due, _ in link.queue]


def test_packets_leave_one_after_the_other_and_arrive_half_a_round_trip_later() -> None:
    link = Link(Shape(rtt_ms=80, rate_mbit_per_s=100))
    for _ in range(3):
        link.take(bytes(1250), 10.0, 0.5)  # 10000 bits: 0.1 ms at 100 Mbit/s
    assert arrivals(link) == pytest.approx([10.0401, 10.0402, 10.0403])
    assert link.due(10.04) is None
    assert link.due(10.0402) == bytes(1250)
    assert (link.packets, link.carried) == (1, 1250)


def test_a_queue_longer_than_a_round_trip_is_dropped() -> None:
    link = Link(Shape(rtt_ms=80, rate_mbit_per_s=1))
    for _ in range(100):
        link.take(bytes(1250), 0.0, 0.5)  # 10 ms each
    assert (len(link.queue), link.dropped) == (9, 91)


def test_loss_is_by_chance() -> None:
    link = Link(Shape(loss_percent=0.1))
    for number in range(1000):
        link.take(b"", 0.0, number / 1000)
    assert (link.lost, len(link.queue)) == (1, 999)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(20, 1500), st.floats(0, 0.999)), max_size=50),
    st.floats(0, 200),
    st.floats(0, 1000),
)
def test_order_is_kept_and_nothing_vanishes(
    packets: list[tuple[float, int, float]], rtt: float, rate: float
) -> None:
    link = Link(Shape(rtt, rate, loss_percent=10))
    for now, size, chance in sorted(packets):
        link.take(bytes(size), now, chance)
    assert arrivals(link) == sorted(arrivals(link))
    assert len(link.queue) + link.lost + link.dropped == len(packets)


@pytest.fixture
def cables(tmp_path: Path) -> Iterator[EmulatedCables]:
    laid = EmulatedCables(["east"], Shape(rtt_ms=40, rate_mbit_per_s=100, loss_percent=0.1), tmp_path)
    try:
        laid.lay()
        yield laid
    finally:
        laid.cut()


SERVE = """
import socket, sys
with socket.create_server((sys.argv[1], 5001)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    with connection:
        received = 0
        while data := connection.recv(1 << 20):
            received += len(data)
        connection.sendall(received.to_bytes(8, "big"))
"""

SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5001)) as link:
    count, began = int(sys.argv[2]), time.monotonic()
    link.sendall(bytes(count))
    link.shutdown(socket.SHUT_WR)
    assert int.from_bytes(link.recv(8), "big") == count
    print(count * 8e-6 / (time.monotonic() - began))
"""


@needs_root
def test_tcp_gets_through_at_no_more_than_the_rate(cables: EmulatedCables) -> None:
    count = 8 << 20
    inside = ["ip", "netns", "exec", cables.spaces["east"]]
    python = [sys.executable, "-c"]
    with subprocess.Popen(
        [*inside, *python, SERVE, cables.address("east")], stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        command = [*python, SEND, cables.address("east"), str(count)]
        sent = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert 0 < float(sent.stdout) <= 100
    there = cables.statistics()["hub>east"]
    assert count < there["carried"] < 1.15 * count  # headers, and what was sent again
    print(f"{float(sent.stdout):.1f} Mbit/s", there)
