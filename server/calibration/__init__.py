"""Calibration: what is measured once on a model and kept in a profile."""
