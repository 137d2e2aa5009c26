"""The inputs of one call, checked together, are those that are checked one by one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.client.core import Core
from cortex_tasks.errors import InvalidInput
from cortex_tasks.testing import echo_fleet

CORE = Core(echo_fleet(), 1.0)
PLANS = {
    (task, truncate): CORE.plan(task, model="echo", **({"truncate": True} if truncate else {}))
    for task, truncate in (("embed", False), ("embed", True), ("forecast", False))
}
values = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["", " ", "\t\n", "\x1f", "\u2003", "é", "\ud800", "a" * 10_000, "a" * 10_001, "é" * 10_001]),
    st.sampled_from([None, 7, b"a", ["a"], {"ds": ["2024-01-01", "2024-01-02"], "y": [1, 2]}]),
)


@given(st.sampled_from(sorted(PLANS)), st.lists(values, max_size=8))
def test_checked_together_or_one_by_one(kind: tuple[str, bool], inputs: list[Any]) -> None:
    plan, alone = PLANS[kind], []
    for value in inputs:
        try:
            alone.append(plan.check(value))
        except InvalidInput as error:
            alone.append(error)
    sifted = plan.sift(iter(inputs))
    assert sifted.count == len(inputs)
    together: list[Any] = [None] * len(inputs)
    for index, value in zip(sifted.indexes, sifted.values, strict=True):
        together[index] = value
    for index, error in sifted.refused.items():
        together[index] = error
    assert list(map(str, together)) == list(map(str, alone))
    assert [type(one) for one in together] == [type(one) for one in alone]
