"""Kernels that are known to be wrong, and correct variants of them."""
