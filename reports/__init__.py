"""Tables from records; imports records and measure only, so that they render without torch."""
