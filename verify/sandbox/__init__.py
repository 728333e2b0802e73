"""How a kernel is called and survived: guarded calls, worker processes, and what a kernel takes."""
