"""The lease table: words in registered memory by which holder and receiver agree on a KV cache."""
