"""One host: its servers and their models are watched, probed and repaired. Pure asyncio."""
