"""Adapters to other libraries: imported by the user, never by moesaic itself."""
