"""Code under test. Nothing here imports an oracle."""
