"""Tests for what is logged of an error whose message may quote a client."""

from __future__ import annotations

from pdserve.errors import InstanceError, loggable, shown

SECRET = "a prompt of another tenant"


def test_of_a_foreign_exception_its_kind_and_its_place_are_logged() -> None:
    try:
        f"{SECRET}\udcff".encode()
    except UnicodeEncodeError as error:
        told = loggable(error)
    assert SECRET not in told
    assert told.startswith("UnicodeEncodeError (test_errors.py:")
    assert "in test_of_a_foreign_exception" in told
    assert loggable(KeyError(SECRET)) == "KeyError (nowhere)"


def test_a_deep_stack_is_cut() -> None:
    def deep(levels: int) -> None:
        if not levels:
            raise ValueError(SECRET * 100)
        deep(levels - 1)

    try:
        deep(100)
    except ValueError as error:
        told = loggable(error)
    assert SECRET not in told
    assert len(told) < 400


def test_of_our_own_errors_the_message_is_logged_within_bounds() -> None:
    assert loggable(InstanceError("decode_0 is gone")) == "InstanceError: decode_0 is gone"
    assert len(loggable(InstanceError("x" * 10**6))) < 500


def test_a_value_is_shown_by_its_beginning() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown(7) == "7"
    assert len(shown("x" * 10**6)) < 100
    shown("\ud800").encode()  # the message goes to the client
