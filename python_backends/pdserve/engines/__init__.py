"""What computes: the torch engine, and the emulated one behind the same calls."""
