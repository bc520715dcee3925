"""Transport `nixl`: any network, and between processes of a host, by NIXL over UCX."""
