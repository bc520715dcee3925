"""Test which keys, prefixes and transactions are refused before any store sees them."""

from __future__ import annotations

import pytest

from pdserve.control.store.errors import Refused
from pdserve.control.store.keys import (
    MAX_BYTES,
    MAX_KEY,
    MAX_OPERATIONS,
    check_key,
    check_prefix,
    check_transaction,
    is_key,
)
from pdserve.control.store.protocol import Compare, Delete, Put

BAD = (
    *("", "/", "a/", "/a", "a//b", ".", "..", "a/..", "../a", "a/./b", "a/../b", "a b", "a\n"),
    *("a\0", "ä", "a*", "a" * (MAX_KEY + 1)),
)
GOOD = "a", "a/b", "...", "a..b/.c", "A-1_2.x", "a" * MAX_KEY


@pytest.mark.parametrize("key", BAD)
def test_no_key_leads_out_of_its_deployment(key: str) -> None:
    assert not is_key(key)
    with pytest.raises(Refused, match="is invalid; allowed are at most 256 characters"):
        check_key(key)
    with pytest.raises(Refused, match=r"key .* is invalid"):
        check_transaction((), [Put(key, b"")])
    with pytest.raises(Refused, match=r"key .* is invalid"):
        check_transaction([Compare(key, "value", b"")], ())
    if key:
        with pytest.raises(Refused, match=r"prefix .* is invalid"):
            check_prefix(f"{key}/")


@pytest.mark.parametrize("key", GOOD)
def test_keys(key: str) -> None:
    assert check_key(key) == key
    assert check_prefix(f"{key}/") == f"{key}/"
    with pytest.raises(Refused, match="ends with a slash"):
        check_prefix(key)


def test_an_empty_prefix_is_everything() -> None:
    assert check_prefix("") == ""


def test_transactions_have_bounds() -> None:
    puts = [Put(f"a/{number}", b"") for number in range(MAX_OPERATIONS)]
    check_transaction([Compare("a", "value", b"")] * MAX_OPERATIONS, puts)
    with pytest.raises(Refused, match="129 operations in a transaction; at most 128"):
        check_transaction((), [*puts, Delete("b")])
    with pytest.raises(Refused, match="129 conditions"):
        check_transaction([Compare("a", "value", b"")] * (MAX_OPERATIONS + 1), ())
    with pytest.raises(Refused, match="key 'a/0' is written twice"):
        check_transaction((), [puts[0], Delete("a/0")])
    half = bytes(MAX_BYTES // 2)
    check_transaction((), [Put("a", half), Put("b", half)])
    with pytest.raises(Refused, match=r"1048577 bytes of values .* key 'a'; at most 1048576"):
        check_transaction((), [Put("a", half), Put("b", half + b"1")])
