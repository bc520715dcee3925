"""Transport `cuda_ipc`: device memory within one host. It has not run on hardware."""
