"""Starts, stops and inspects the servers of a deployment."""

from pdctl import descriptors

# Before anything that an import below opens: this is the first module of every command.
descriptors.fill()
