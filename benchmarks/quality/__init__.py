"""What steering does to answers: a small world of drawn scenes and the model that learnt it.

headway bench quality --quick      # minutes: the demo model on its own scenes
headway bench quality --url http://localhost:8000 --model NAME --pope FILE... --images DIR
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; see `command.run`."""
    # Not at the top: the training of the demo model needs the scenes and no HTTP client.
    from headway.benchmarks.quality.command import run

    return run(argv)
