"""Which keys, values and transactions every store takes: the bounds of etcd, or tighter ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pdserve.control.store.errors import Refused
from pdserve.control.store.protocol import Compare, Delete, Put
from pdserve.errors import shown

MAX_OPERATIONS = 128
"""Operations, and conditions, of a transaction: the default of etcd's --max-txn-ops."""
MAX_KEY = 256
"""Characters of a key."""
MAX_BYTES = 1 << 20
"""Bytes of the values in a transaction; etcd takes 1.5 MiB as a request by default."""

_SEGMENT = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_ALLOWED = (
    f"at most {MAX_KEY} characters: names of letters, digits and . _ - with one slash between two, "
    "and none of them . or .."
)


def is_key(key: str) -> bool:
    """Tell whether every store takes this key."""
    return len(key) <= MAX_KEY and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """Return the key.

    Raises:
        Refused: it is none, for example since it would lead out of the deployment.
    """
    if not is_key(key):
        raise Refused(f"key {shown(key)} is invalid; allowed are {_ALLOWED}")
    return key


def check_prefix(prefix: str) -> str:
    """Return the prefix, which is empty or a key with a slash at its end.

    Raises:
        Refused: it is neither.
    """
    if prefix and not (prefix.endswith("/") and is_key(prefix[:-1])):
        raise Refused(
            f"prefix {shown(prefix)} is invalid; allowed are an empty one, and one that ends with "
            f"a slash, before which there are {_ALLOWED}"
        )
    return prefix


def check_transaction(compare: Sequence[Compare], operations: Sequence[Put | Delete]) -> None:
    """Raises Refused: no store takes this transaction; the message names why."""
    for what, number in ("conditions", len(compare)), ("operations", len(operations)):
        if number > MAX_OPERATIONS:
            raise Refused(f"{number} {what} in a transaction; at most {MAX_OPERATIONS} are allowed")
    for one in compare:
        check_key(one.key)
    seen: set[str] = set()
    size = 0
    for operation in operations:
        if check_key(operation.key) in seen:
            raise Refused(f"key {operation.key!r} is written twice in a transaction")
        seen.add(operation.key)
        if isinstance(operation, Put):
            size += len(operation.value)
    if size > MAX_BYTES:
        raise Refused(
            f"{size} bytes of values in a transaction that begins with key {operations[0].key!r}; "
            f"at most {MAX_BYTES} are allowed"
        )
