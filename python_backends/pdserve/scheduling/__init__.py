"""Which instance does what, when: pure asyncio, without Triton and without torch."""
