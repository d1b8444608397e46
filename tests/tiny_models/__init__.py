"""Tiny checkpoints of random weights of the image models that Headway is checked with."""
