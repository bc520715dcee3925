"""Looking after instances and servers: health, probes, repair. Pure asyncio, as scheduling is."""
