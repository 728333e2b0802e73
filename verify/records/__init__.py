"""What happened in a run, as values and as lines of JSON. Loads without torch."""
