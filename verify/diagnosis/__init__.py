"""Why a case fails, and a script that shows it."""
