"""Fills an inventory from this host; what cannot be found out is left open, with the reason."""
