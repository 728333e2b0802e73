"""What a kernel turns out to do: conventions, arithmetic, determinism. Printed, never judged."""
