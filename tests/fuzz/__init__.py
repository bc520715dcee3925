"""Random input at a real server, bounded by a count and by time: ``make fuzz``.

`budget` draws the input, `aftermath` says what must be so afterwards; each file of tests is one
side that is fed.
"""
