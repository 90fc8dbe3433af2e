"""Tables of implementations: backends/<backend>/<room>.py holds one row per op that it serves."""
