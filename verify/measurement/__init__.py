"""Error tables, speed, and the baseline of errors: they measure and judge nothing."""
