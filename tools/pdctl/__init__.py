"""Starts, stops and inspects the servers of a deployment."""

from pdctl import descriptors

# This must precede every file that an import below opens; every command imports it first.
descriptors.fill()
