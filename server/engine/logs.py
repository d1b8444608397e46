"""Where Headway's log goes: where vLLM's does, in its form, from its level on.

vLLM symbols relied on: the logger `vllm`, which `configure_logging` sets up in every process before
plugins are loaded there, and sets up anew where options ask for it. vLLM sets up no other logger;
what is below WARNING would not be seen at all.
"""

from __future__ import annotations

import logging

OURS = logging.getLogger("headway")
VLLM = logging.getLogger("vllm")


class ThroughVllm(logging.Handler):
    """Passes records on to whatever handlers the logger of vLLM has by then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as one of vLLM's own."""
        VLLM.handle(record)


def write_as_vllm() -> None:
    """Set up the logger `headway`, unless somebody did, for it or for all loggers.

    Calling it again takes over vLLM's level anew.
    """
    if not VLLM.handlers:  # VLLM_CONFIGURE_LOGGING=0
        return
    if not OURS.hasHandlers():
        OURS.addHandler(ThroughVllm())
    if any(isinstance(handler, ThroughVllm) for handler in OURS.handlers):
        OURS.setLevel(VLLM.getEffectiveLevel())
