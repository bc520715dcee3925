"""The transfer plane, which moves KV caches from prefill processes to decode processes."""
