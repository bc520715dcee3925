"""One host: its servers and their models watched, probed and repaired. Pure asyncio."""
