"""The sending side: a prefill's memory, its leased ranges, and how receivers reach them."""
