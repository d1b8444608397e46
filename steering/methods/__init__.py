"""Steering methods, one per file."""
