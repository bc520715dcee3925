"""Book-keeping of KV memory: layout, hand-off handle, prefill arena, paged blocks, prefix index.

Nothing here touches the memory itself, reads a clock or waits; each object belongs to one thread.
"""
