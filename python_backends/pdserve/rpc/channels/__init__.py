"""How an instance is reached. Both ways carry opaque bytes and look the same from above."""
