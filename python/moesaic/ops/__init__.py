"""Doors: one file per room with the public functions.  Each validates once, normalises and calls
the registry; nothing below a door raises for what a user passed."""
