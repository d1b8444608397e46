"""The HTTP surface: vLLM's OpenAI routes with a `steering` field, and the steering routes."""
