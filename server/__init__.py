"""The server: vLLM with per-request steering, OpenAI-compatible HTTP routes, the command line."""
