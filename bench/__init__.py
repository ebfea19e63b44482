"""Benchmarks: cuflash beside its peers on the same tensors. ``python -m bench --help``; what is measured: README.md."""
