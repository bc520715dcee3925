"""A decode's side: its links to holders, and how it pulls KV caches over them."""
