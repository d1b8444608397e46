"""Where steering happens: the integration with vLLM's engine, one seam per file."""
