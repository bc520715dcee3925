"""Groups that keep themselves in shape: what is observed of them, and pure decisions."""
