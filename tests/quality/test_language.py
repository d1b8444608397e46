"""The heuristic for programming languages, on answers as models give them."""

from __future__ import annotations

import pytest

from headway.benchmarks.quality.language import language_of, language_shares

pytestmark = pytest.mark.unit

CPP = """\
#include <iostream>
int main() {
    std::cout << "hello" << std::endl;
}
"""
PYTHON = """\
import numpy as np

def mean(values):
    for value in values:
        print(value)
    return np.mean(values)
"""
JAVA = """\
import java.util.*;

public class Main {
    public static void main(String[] args) {
        System.out.println("hello");
    }
}
"""
JULIA = """\
using LinearAlgebra

function norms(m::Matrix)
    println(size(m))
    return sqrt.(sum(m .^ 2, dims=1))
end
"""


@pytest.mark.parametrize(
    ("code", "language"), [(CPP, "C++"), (PYTHON, "Python"), (JAVA, "Java"), (JULIA, "Julia")]
)
def test_code_is_told_with_and_without_fences(code: str, language: str) -> None:
    assert language_of(code) == language
    assert language_of(f"Here it is:\n\n```\n{code}```\nThat is all.") == language


@pytest.mark.parametrize(
    ("answer", "language"),
    [
        ("```cpp\nx\n```", "C++"),
        ("Sure!\n```C++\nx\n```", "C++"),
        ("```py\nx", "Python"),  # cut off by the limit on tokens
        (f"```julia\nx = 1\n```\nand in Python:\n```python\n{PYTHON}```", "Julia"),
        (f"```rust\n{CPP}```", "none"),  # the tag decides, also for a language that is not ours
        ("In C++ you would use a vector, in Python a list.", "none"),
        ("I am sorry, I cannot help with that.", "none"),
        ("import java", "none"),
        ("", "none"),
    ],
)
def test_answers(answer: str, language: str) -> None:
    assert language_of(answer) == language


def test_shares_add_up_to_one() -> None:
    shares = language_shares([CPP, CPP, PYTHON, "no code"])
    expected = {"C++": 0.5, "Python": 0.25, "Java": 0.0, "Julia": 0.0, "none": 0.25}
    assert shares == expected
    with pytest.raises(ValueError, match="no answers"):
        language_shares([])
