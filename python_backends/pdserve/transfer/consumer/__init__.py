"""A decode's side: the holders that it has met, and how it pulls KV caches from them."""
