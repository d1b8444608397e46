"""Importers: vector profiles from the files of other steering libraries.

Only the command line reads such files. Over HTTP a server takes profiles of its own format alone.
"""
