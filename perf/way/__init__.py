"""The way of a request through the code, module by module."""
