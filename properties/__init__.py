"""What must hold, and every pytest file."""
