"""Short texts of many kinds to measure a model on."""

from __future__ import annotations

from pathlib import Path

PROMPTS = (
    "Describe what can be seen from a train window in the mountains.",
    "What is 17 times 23? Show the steps.",
    "Write a Python function that reverses a linked list.",
    "Les oiseaux migrateurs traversent la mer en automne. Traduisez cette phrase en anglais.",
    "List three vegetables, three fruits and three spices; separate them with commas.",
    "Der Zug nach Hamburg hat heute leider zwanzig Minuten Verspätung.",
    "Explain to a child why the sky is blue and sunsets are red.",
    'Fix this JSON: {"name": "Ada", "born": 1815, "fields": ["mathematics" "computing"]}',
    "Once upon a time there was a lighthouse keeper who collected clocks.",
    "Is it safe to keep cooked rice in the fridge for a week?",
    "La receta lleva dos huevos, un vaso de leche y una pizca de sal.",
    "SELECT city, COUNT(*) FROM orders WHERE total > 100 GROUP BY city;",
    "Summarise: The committee met on Tuesday. It agreed on the budget. The roof will be repaired.",
    "Sehr geehrte Frau Lang, vielen Dank für Ihre Nachricht vom 3. März.",
    "Compare bicycles and buses for a commute of eight kilometres.",
    "The patient reports a dry cough, no fever, and mild fatigue since last week.",
)
"""The built-in prompts: questions, prose, code, data and lists, in several languages."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line; empty lines are skipped.

    Raises OSError if it cannot be read, ValueError if there is none in it.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path}: the file holds no prompt")
    return prompts
