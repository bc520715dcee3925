"""What the fakes compute and move KV caches with; nothing here is of the library's API."""
