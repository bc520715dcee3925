"""What a gateway knows of its KV links, and which instances it avoids because of it."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from pdserve.rpc.messages import Connected
from pdserve.scheduling.link_table import LinkTable
from pdserve.transfer.reports import LinkReport

PREFILLS, DECODES = ["prefill_0", "prefill_1"], ["decode_0", "decode_1", "decode_2"]
CONNECTED = Connected("prefill", LinkReport("shm", "", 1e-6, 1e9, {}, False), 1000)


def test_pair_is_unknown_until_it_is_linked_or_refused() -> None:
    table = LinkTable(PREFILLS, DECODES)
    assert table.counts() == {"connected": 0, "refused": 0, "unknown": 6}
    table.made(("prefill_0", "decode_0"), b"there", CONNECTED)
    table.refuse(("prefill_0", "decode_1"), "no way")
    assert table.counts() == {"connected": 1, "refused": 1, "unknown": 4}
    assert table.endpoint(("prefill_0", "decode_0")) == b"there"
    assert set(table.others("prefill_0")) == {"decode_0"}
    assert table.refusal("prefill_0", "decode_1") == "no way"
    table.lost(("prefill_0", "decode_0"))
    assert table.counts() == {"connected": 0, "refused": 1, "unknown": 5}


def test_refusal_is_new_until_it_is_repeated_and_ends_with_a_link() -> None:
    table, pair = LinkTable(PREFILLS, DECODES), ("prefill_0", "decode_0")
    assert [table.refuse(pair, reason) for reason in ("no", "no", "never")] == [True, False, True]
    table.made(pair, b"", CONNECTED)
    assert table.refusal(*pair) is None


def test_prefill_that_no_decode_reaches_is_avoided_as_long_as_there_are_others() -> None:
    table = LinkTable(PREFILLS, DECODES)
    for decode in DECODES:
        assert not table.avoided
        assert table.unreachable("prefill_0") == {}
        table.refuse(("prefill_0", decode), "no way")
    assert table.avoided == {"prefill_0"}
    assert table.unreachable("prefill_0") == dict.fromkeys(DECODES, "no way")
    for decode in DECODES:
        table.refuse(("prefill_1", decode), "no way")
    assert not table.avoided, "each of them is as bad as the other"


def test_instance_that_joins_is_avoided_until_its_links_are_settled() -> None:
    table = LinkTable(PREFILLS[:1], DECODES[:2])
    table.update(PREFILLS, DECODES[:2], ["prefill_1"])
    assert table.avoided == {"prefill_1"}
    table.made(("prefill_1", "decode_0"), b"", CONNECTED)
    assert table.avoided == {"prefill_1"}
    table.refuse(("prefill_1", "decode_1"), "no way")
    assert not table.avoided
    table.update(PREFILLS, DECODES, ["decode_2"])
    assert table.avoided == {"decode_2"}
    table.joined("decode_2")
    assert not table.avoided


def test_instance_that_joins_is_used_at_once_where_no_other_can_be() -> None:
    table = LinkTable(PREFILLS[:1], DECODES)
    for decode in DECODES:
        table.refuse(("prefill_0", decode), "no way")
    table.update(PREFILLS, DECODES, ["prefill_1"])
    assert table.avoided == {"prefill_0"}
    table.update(PREFILLS[1:], DECODES, [])
    assert not table.avoided


pairs = st.tuples(st.sampled_from(PREFILLS), st.sampled_from(DECODES))
events = st.one_of(
    st.tuples(st.just("made"), pairs),
    st.tuples(st.just("refuse"), pairs),
    st.tuples(st.just("lost"), pairs),
    st.tuples(
        st.just("update"),
        st.tuples(
            st.sets(st.sampled_from(PREFILLS), min_size=1),
            st.sets(st.sampled_from(DECODES), min_size=1),
        ),
    ),
)


@given(st.lists(events, max_size=30))
def test_some_instance_of_each_role_is_never_avoided(history: list[tuple[str, tuple]]) -> None:  # type: ignore[type-arg]
    table, prefills, decodes = LinkTable(PREFILLS, DECODES), set(PREFILLS), set(DECODES)
    for event, about in history:
        if event == "made":
            table.made(about, b"", CONNECTED)
        elif event == "refuse":
            table.refuse(about, "no way")
        elif event == "lost":
            table.lost(about)
        else:
            before = prefills | decodes
            prefills, decodes = about
            table.update(sorted(prefills), sorted(decodes), (prefills | decodes) - before)
        assert not prefills <= table.avoided
        assert not decodes <= table.avoided
        assert table.avoided <= prefills | decodes
        assert set(table.pairs()) == set(product(prefills, decodes))
        assert sum(table.counts().values()) == len(prefills) * len(decodes)
