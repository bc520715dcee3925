"""Moving a KV cache from the process that computed it to the one that decodes with it."""
