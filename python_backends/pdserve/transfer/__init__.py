"""The transfer plane: moves KV caches from the process that computed them to the one that
decodes."""
