"""How far a result may be from the exact answer, and how far it should be. Derived in BOUNDS.md."""
