"""A prefill's side: its memory, the ranges that are leased, and the ways that lead there."""
