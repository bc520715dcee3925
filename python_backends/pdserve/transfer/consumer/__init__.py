"""The receiving side: a decode's links to holders, and how it pulls KV caches over them."""
