"""Every recorded case is read by a parity test, or stands here as not yet covered.

What a test reads is taken from its source: `case("name")`, `case(CONSTANT)`, or `case(name)` with `name` parametrised.
"""

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_parity_generation
import test_parity_grn
import test_parity_grn_tokenizer
import test_parity_imagenet
import test_parity_infinity
import test_parity_model
import test_parity_tokenizer
import test_parity_var
from golden_cases import meta
from grn_cases import recorded
from scale_cases import infinity_recorded, var_recorded

MODULES = (test_parity_generation, test_parity_imagenet, test_parity_model, test_parity_tokenizer)
LATER: set[str] = set()
# An output that no test reads, of a case that is run otherwise: zero-padding mixes padding into the group norms.
LATER_OUTPUTS = {"ae_alt/vt_forward": "tokens_maxpad"}


def cases_read_by(module: ModuleType, reader: str = "case") -> set[str]:
    """Names that reach `case(…)`, or another reader, in the tests of a module."""
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    read: set[str] = set()
    for test in ast.parse(source).body:
        if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
            continue
        given = {}
        for decorator in test.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "attr", "") == "parametrize":
                given[value(decorator.args[0], module)] = decorator.args[1]
        for call in ast.walk(test):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == reader:
                (argument,) = call.args
                if isinstance(argument, ast.Name) and argument.id in given:
                    read |= set(value(given[argument.id], module))
                elif not isinstance(argument, ast.Name) or argument.id in vars(module):
                    read.add(value(argument, module))
    return read


def value(expression: ast.expr, module: ModuleType) -> Any:
    """A constant expression of the module's source."""
    return eval(compile(ast.Expression(expression), module.__name__, "eval"), vars(module))


def test_every_recorded_case_is_read_or_listed_as_later() -> None:
    read = set.union(*map(cases_read_by, MODULES))
    assert sorted(set(meta()["cases"]) - read - LATER) == [], "recorded, and no parity test reads it"
    assert sorted(read & LATER) == [], "read by now; take it from the list"
    assert sorted(read - set(meta()["cases"])) == []


def test_every_recorded_case_of_refinement_is_read() -> None:
    read = set.union(*(cases_read_by(module, "grn_case") for module in (test_parity_grn, test_parity_grn_tokenizer)))
    assert sorted(read ^ set(recorded()["cases"])) == []


@pytest.mark.parametrize(
    ("module", "reader", "known"),
    [
        (test_parity_var, "var_case", var_recorded()["cases"]),
        (test_parity_infinity, "infinity_case", infinity_recorded()["cases"]),
    ],
)
def test_every_recorded_case_of_next_scale_models_is_read_or_listed_as_later(module: Any, reader: str, known: Any) -> None:
    read = cases_read_by(module, reader)
    assert sorted(set(known) - read - module.LATER) == [] and sorted(read & module.LATER) == []


def test_the_outputs_left_for_later_exist_and_are_unread() -> None:
    for name, output in LATER_OUTPUTS.items():
        assert output in meta()["cases"][name]["outputs"]
        assert not any(f"out.{output}" in Path(module.__file__ or "").read_text("utf-8") for module in MODULES)


def test_an_unread_case_is_noticed() -> None:
    """The search above sees only what tests read: not what a module merely mentions."""
    assert "timestep_embedding" in cases_read_by(test_parity_generation)
    assert "timestep_embedding" not in cases_read_by(test_parity_model)
