"""Transport `nixl`: NIXL over UCX, for any network and between processes of a host."""
