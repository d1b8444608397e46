"""The renderer against what Go's templates and Helm do, by their documentation."""

from typing import Any

import pytest

from tests.deploy.gotemplate import TemplateError, Templates, to_json, to_yaml

pytestmark = pytest.mark.unit

DOT = {
    **{"a": {"b": "x y"}, "list": [1, 2], "map": {"z": 1, "k": 2}, "no": None, "zero": 0},
    "files": {"Get": lambda name: f"text of {name}"},
}


def render(source: str, dot: Any = DOT) -> str:
    templates = Templates()
    return templates.render(templates.add(source), dot)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ .a.b }}", "x y"),
        ("a {{- /* nothing */ -}} b", "ab"),
        ("a\n  {{- .a.b }}\nb", "ax y\nb"),
        ("{{ .a.b | quote }}", '"x y"'),
        ('{{ printf "%s-%d" .a.b (int "3") }}', "x y-3"),
        ("{{ range $item := .list }}[{{ $item }}{{ $.a.b }}]{{ end }}", "[1x y][2x y]"),
        ("{{ range $key, $value := .map }}{{ $key }}={{ $value }};{{ end }}", "k=2;z=1;"),
        ("{{ range .no }}x{{ else }}none{{ end }}", "none"),
        ("{{ if .no }}1{{ else if .list }}2{{ else }}3{{ end }}", "2"),
        ("{{ if and .list (not .no) }}yes{{ end }}", "yes"),
        ("{{ with .a }}{{ .b }}{{ end }}", "x y"),
        ("{{ with .no }}{{ .b }}{{ end }}", ""),
        ('{{ .zero | default "d" }}', "d"),
        ('{{ if kindIs "invalid" .zero }}1{{ else }}0{{ end }}', "0"),
        ('{{ if kindIs "invalid" .a.c }}1{{ else }}0{{ end }}', "1"),
        ('{{ define "n" }}<{{ .b }}>{{ end }}{{ include "n" .a | nindent 2 }}', "\n  <x y>"),
        ('{{ $v := .a.b }}{{ if true }}{{ $v := "in" }}{{ end }}{{ $v }}', "x y"),
        ("{{ .map | toYaml | nindent 2 }}", "\n  k: 2\n  z: 1"),
        ('{{ .files.Get "a" | replace "t" (printf "\\"%s\\"" .zero) }}', '"0"ex"0" of a'),
    ],
)
def test_renders_as_go_does(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ .no }}",
        "{{ .missing.b }}",
        "{{ tpl .a.b . }}",
        "{{ $unknown }}",
        "{{ if .a }}",
        "{{ (.a }}",
        '{{ include "n" . }}',
    ],
)
def test_refuses_what_is_wrong_or_outside_the_subset(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_json_is_that_of_go() -> None:
    assert to_json({"b": 2.0, "a": [0.5, "é<&"]}) == '{"a":[0.5,"é\\u003c\\u0026"],"b":2}'


def test_yaml_has_sorted_keys() -> None:
    assert to_yaml({"b": ["x"], "a": 1}) == "a: 1\nb:\n- x"
