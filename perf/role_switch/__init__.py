"""Measures instances that change roles, on real servers under load."""
