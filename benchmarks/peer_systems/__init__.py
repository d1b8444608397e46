"""The systems that `headway bench peers` compares Headway with, one per file.

A system that serves is a `Peer` and a class with the method `answer` (`protocol.py`); it runs in a
process of its own, in the environment that its requirements make.
"""
