"""Fills an inventory of this host; what cannot be found out is left open, with the reason."""
