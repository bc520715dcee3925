"""Random input at a real server, bounded by a count and by time: ``make fuzz``.

`budget` draws the input, and `aftermath` checks the server afterwards; each file of tests is one
interface that receives input.
"""
