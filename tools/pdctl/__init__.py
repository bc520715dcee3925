"""Starts, stops and inspects the servers of a deployment."""
