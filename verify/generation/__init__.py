"""Which cases are drawn."""
