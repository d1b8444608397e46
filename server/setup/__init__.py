"""Repairs to the Python environment that Headway is installed into; run by `make setup`."""
