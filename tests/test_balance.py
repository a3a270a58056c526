"""Steps that let unequal workers finish together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcloud.balance import Mode, Pace, balanced_steps


def paced(seconds: float, extra: float = 0.0, mode: Mode = "dynamic") -> Pace:
    pace = Pace(mode)
    pace.note(seconds, extra)
    return pace


workers = st.lists(
    st.tuples(st.integers(1, 64), st.floats(0.01, 2.0), st.floats(0.0, 0.5)), min_size=1, max_size=6
)


@given(workers, st.integers(20, 200))
def test_all_finish_within_a_step_and_read_what_is_asked(
    found: list[tuple[int, float, float]], usual: int
) -> None:
    strides = [stride for stride, _, _ in found]
    paces = [paced(seconds, extra) for _, seconds, extra in found]
    total = usual * sum(strides)
    steps = balanced_steps(total, strides, paces, usual)
    assert all(one >= 1 for one in steps)
    free = [i for i, one in enumerate(steps) if one > 1]  # the others are held up by their one step
    ends = [steps[i] * paces[i].seconds + paces[i].extra for i in free]
    slowest = max(pace.seconds for pace in paces)
    if len(free) == len(steps):
        assert max(ends) - min(ends) <= slowest + 1e-9
        read = sum(one * stride for one, stride in zip(steps, strides, strict=True))
        assert abs(read - total) <= 0.5 * sum(strides) + 1e-6


def test_hand_made() -> None:
    """Two workers twice as fast as the third: it takes half their steps, and the sum stays."""
    assert balanced_steps(150, [1, 1, 1], [paced(0.1), paced(0.1), paced(0.2)], 50) == [60, 60, 30]


def test_extra_seconds_cost_steps() -> None:
    """One of two equal workers sends for a second: it takes ten steps of 0.1 s less than the other."""
    first, second = balanced_steps(200, [1, 1], [paced(0.1, 1.0), paced(0.1)], 100)
    assert second - first == 10
    assert first + second == 200


@pytest.mark.parametrize("paces", [[Pace("dynamic"), paced(0.1)], [paced(0.1, mode="fixed"), paced(0.2)]])
def test_equal_steps_until_all_are_known(paces: list[Pace]) -> None:
    assert balanced_steps(60, [1, 1], paces, 30) == [30, 30]


def test_nobody_goes_below_the_least() -> None:
    assert balanced_steps(20, [1, 1], [paced(0.01), paced(10.0)], 10, least=3)[1] == 3


def test_a_dynamic_pace_forgets_the_first_round_and_follows() -> None:
    pace = Pace("dynamic")
    for seconds in (9.0, 1.0, 2.0):
        pace.note(seconds)
    assert pace.seconds == 1.5
    for seconds in (4.0, 4.0, 4.0):
        pace.note(seconds)
    assert pace.seconds == 4.0


def test_a_proportional_pace_stays() -> None:
    pace = Pace("proportional")
    pace.note(9.0)
    assert pace.seconds == 9.0
    for seconds in (1.0, 5.0, 5.0):
        pace.note(seconds)
    assert pace.seconds == 1.0
