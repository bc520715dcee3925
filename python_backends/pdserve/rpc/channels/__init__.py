"""Channels to an instance: both kinds carry opaque bytes and have the same interface."""
