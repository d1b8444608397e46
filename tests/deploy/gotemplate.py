"""Renders the part of Go's template language that the chart keeps to; Helm renders it the same.

Actions: `{{ pipeline }}` with trim markers, comments, `$name := pipeline`, `define`, `if` / `else
if` / `else`, `with`, `range` (also `range $key, $value :=`), `end`. Operands: `.`, `.path`,
`$name.path`, strings, whole numbers, true, false, (pipelines). Functions: those of `FUNCTIONS`,
`include`, and those that a path leads to, such as `.Files.Get`. Everything else is refused.
Stricter than Helm: printing nothing is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

ACTION = re.compile(r"\{\{(-\s)?\s*(/\*.*?\*/|.*?)\s*(\s-)?\}\}", re.DOTALL)
TOKEN = re.compile(r'\s*(:=|[|(),]|"(?:[^"\\]|\\.)*"|[^\s|(),"]+)')
OPENERS = ("if", "with", "range", "define")


class TemplateError(ValueError):
    """A template that does not render, or goes beyond the subset."""


@dataclass
class Node:
    """Text, an action, or a block: `branches` are (condition, nodes), an else has none."""

    kind: str
    text: str = ""
    branches: list[tuple[str, list[Node]]] = field(default_factory=list)


@dataclass
class Scope:
    """`.` and the variables that can be seen; `inner` scopes may assign names of their own."""

    dot: Any
    names: dict[str, Any]

    def inner(self, dot: Any) -> Scope:
        """A scope with another `.`, in which new names are lost at its end."""
        return Scope(dot, dict(self.names))


class Templates:
    """Named templates, as the files of a chart define them."""

    def __init__(self) -> None:
        self._named: dict[str, list[Node]] = {}

    def add(self, source: str) -> list[Node]:
        """Parse a file; its definitions are kept, the rest is returned."""
        rest = []
        for node in parse(source):
            if node.kind == "define":
                (name, nodes), *_ = node.branches
                self._named[json.loads(name)] = nodes
            else:
                rest.append(node)
        return rest

    def render(self, nodes: list[Node], dot: Any) -> str:
        """The text of a template for a value of `.`."""
        return self._run(nodes, Scope(dot, {"$": dot}))

    def _run(self, nodes: list[Node], scope: Scope) -> str:
        return "".join(self._node(node, scope) for node in nodes)

    def _node(self, node: Node, scope: Scope) -> str:
        if node.kind == "text":
            return node.text
        if node.kind == "action":
            tokens = tokens_of(node.text)
            if tokens[1:2] == [":="]:
                scope.names[tokens[0]] = self._pipeline(tokens[2:], scope)
                return ""
            value = self._pipeline(tokens, scope)
            if value is None:
                raise TemplateError(f"{{{{ {node.text} }}}} is nothing")
            return as_text(value)
        if node.kind == "range":
            return self._range(node, scope)
        for condition, nodes in node.branches:
            value = self._pipeline(tokens_of(condition), scope) if condition else True
            if value:
                inner = scope.inner(value if node.kind == "with" and condition else scope.dot)
                return self._run(nodes, inner)
        return ""

    def _range(self, node: Node, scope: Scope) -> str:
        (head, body), *others = node.branches
        tokens = tokens_of(head)
        split = tokens.index(":=") if ":=" in tokens else -1
        names = [token for token in tokens[: max(split, 0)] if token != ","]
        items = self._pipeline(tokens[split + 1 :], scope)
        if not items:
            return "".join(self._run(nodes, scope.inner(scope.dot)) for _, nodes in others)
        # Go walks maps in the order of their keys.
        pairs = sorted(items.items()) if isinstance(items, Mapping) else enumerate(items)
        text = []
        for pair in pairs:
            inner = scope.inner(pair[1])
            inner.names.update(zip(names, pair[2 - len(names) :] if names else (), strict=True))
            text.append(self._run(body, inner))
        return "".join(text)

    def _pipeline(self, tokens: list[str], scope: Scope) -> Any:
        value, piped = None, False
        for command in split_at(tokens, "|"):
            operands = list(self._operands(command, scope))
            if piped:
                operands.append(value)
            value, piped = self._call(operands), True
        return value

    def _operands(self, tokens: list[str], scope: Scope) -> Iterable[Any]:
        position = 0
        while position < len(tokens):
            token = tokens[position]
            position += 1
            if token == "(":
                end = closing(tokens, position)
                yield self._pipeline(tokens[position:end], scope)
                position = end + 1
            else:
                yield self._operand(token, scope)

    def _operand(self, token: str, scope: Scope) -> Any:
        if token.startswith('"'):
            return json.loads(token)
        if re.fullmatch(r"-?\d+", token):
            return int(token)
        if token in ("true", "false"):
            return token == "true"
        if token.startswith((".", "$")):
            start, *path = token.split(".")
            if start and start not in scope.names:
                raise TemplateError(f"no variable {start}")
            return walk(scope.names[start] if start else scope.dot, path, token)
        if token == "include":
            return self._include
        if token in FUNCTIONS:
            return FUNCTIONS[token]
        raise TemplateError(f"{token} is not in the subset of templates")

    def _include(self, name: str, dot: Any) -> str:
        if name not in self._named:
            raise TemplateError(f"no template {name}")
        return self.render(self._named[name], dot)

    def _call(self, operands: list[Any]) -> Any:
        head, *arguments = operands
        if callable(head):
            return head(*arguments)
        if arguments:
            raise TemplateError(f"{head!r} is no function")
        return head


def parse(source: str) -> list[Node]:
    """The nodes of a template. Raises TemplateError."""
    top: list[Node] = []
    open_blocks: list[tuple[Node, list[Node]]] = []
    nodes, position, trim = top, 0, False
    for match in ACTION.finditer(source):
        text = source[position : match.start()]
        text = text.lstrip() if trim else text
        nodes.append(Node("text", text.rstrip() if match[1] else text))
        position, trim = match.end(), bool(match[3])
        word, _, rest = match[2].partition(" ")
        if match[2].startswith("/*"):
            continue
        if word in OPENERS:
            block = Node(word, branches=[(rest, [])])
            nodes.append(block)
            open_blocks.append((block, nodes))
            nodes = block.branches[0][1]
        elif word == "else":
            block = open_blocks[-1][0]
            block.branches.append((rest.removeprefix("if "), []))
            nodes = block.branches[-1][1]
        elif word == "end":
            _, nodes = open_blocks.pop()
        else:
            nodes.append(Node("action", match[2]))
    if open_blocks:
        raise TemplateError(f"{open_blocks[-1][0].kind} without end")
    nodes.append(Node("text", source[position:].lstrip() if trim else source[position:]))
    return top


def tokens_of(text: str) -> list[str]:
    """The tokens of an action."""
    tokens = TOKEN.findall(text)
    if "".join(tokens) != re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", text):
        raise TemplateError(f"cannot read {text}")
    return tokens


def closing(tokens: list[str], position: int) -> int:
    """Where the parenthesis that was opened before `position` is closed."""
    depth = 1
    for index in range(position, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[index], 0)
        if depth == 0:
            return index
    raise TemplateError("a parenthesis is not closed")


def split_at(tokens: list[str], separator: str) -> list[list[str]]:
    """Parts between separators that stand in no parenthesis."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == separator and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def walk(value: Any, path: list[str], token: str) -> Any:
    """A field of a field; a missing one is None, and None has no fields, as in Go."""
    for key in filter(None, path):
        if not isinstance(value, Mapping):
            raise TemplateError(f"{token}: nil pointer, {key} of {value!r}")
        value = value.get(key)
    return value


def as_text(value: Any) -> str:
    """How Go prints a value."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_yaml(value: Any) -> str:
    """YAML with sorted keys and without the last line break, as Helm's."""
    return str(yaml.safe_dump(value, default_flow_style=False, width=10_000)).removesuffix("\n")


def indent(spaces: int, text: str) -> str:
    """Every line moved to the right."""
    return "\n".join(" " * spaces + line for line in text.split("\n"))


def printf(form: str, *values: Any) -> str:
    """Go's, for %s and %d."""
    return form % values


def required(message: str, value: Any) -> Any:
    """The value. Raises TemplateError with the message if there is none."""
    if value in (None, ""):
        raise TemplateError(message)
    return value


def fail(message: str) -> Any:
    """Raises TemplateError with the message."""
    raise TemplateError(message)


def to_json(value: Any) -> str:
    """As Go writes JSON: keys sorted, no spaces, 2 for 2.0, and nothing that HTML would read."""
    text = json.dumps(whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def whole(value: Any) -> Any:
    """A value with floats that are whole as integers."""
    if isinstance(value, Mapping):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def either(*values: Any) -> Any:
    """The first value that counts as true, else the last."""
    return next((value for value in values if value), values[-1])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *numbers: sum(numbers),
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "default": lambda other, value=None: value or other,
    "dict": lambda: {},
    "eq": lambda left, *right: left in right,
    "fail": fail,
    "gt": lambda left, right: left > right,
    "has": lambda wanted, items: wanted in items,
    "indent": indent,
    "index": lambda items, position: items[position],
    "int": int,
    "kindIs": lambda kind, value: (kind == "invalid") == (value is None),
    "list": lambda *values: list(values),
    "max": max,
    "ne": lambda left, right: left != right,
    "nindent": lambda spaces, text: "\n" + indent(spaces, text),
    "not": lambda value: not value,
    "or": either,
    "printf": printf,
    "quote": lambda value: json.dumps(as_text(value), ensure_ascii=False),
    "replace": lambda old, new, text: text.replace(old, new),
    "required": required,
    "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
    "ternary": lambda yes, no, condition: yes if condition else no,
    "toJson": to_json,
    "toYaml": to_yaml,
    "trimSuffix": lambda suffix, text: text.removesuffix(suffix),
    "trunc": lambda size, text: text[:size],
}
