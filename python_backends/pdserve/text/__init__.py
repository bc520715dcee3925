"""Conversion of prompts and conversations to token ids, and of token ids to text."""
