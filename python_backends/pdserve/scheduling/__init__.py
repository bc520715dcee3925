"""Scheduling: which instance serves which request, and when.

Pure asyncio, without Triton or torch.
"""
