"""One engine in one role: admission, batching and the hand-over of KV caches."""
