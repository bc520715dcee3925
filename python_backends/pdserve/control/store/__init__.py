"""The store of the control plane: a small protocol, and what is built on it alone."""
