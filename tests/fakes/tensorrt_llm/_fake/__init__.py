"""The part of the fakes that computes and moves KV caches, without any of the library's API."""
