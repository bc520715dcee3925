"""The lease table: the words in registered memory by which both sides agree on a KV cache."""
