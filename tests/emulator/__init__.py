"""The Hopper kernels on the host; see README.md."""
