"""Where an oracle, a bound and a kernel's output meet."""
