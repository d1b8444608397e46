"""Profiles, artefacts and presets that clients put on a server: kept on disk, shared by servers."""
