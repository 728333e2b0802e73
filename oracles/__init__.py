"""Exact attention. Nothing here imports a kernel."""
