"""That every mutant still has its place in the code: one that is not found there says nothing about the tests."""

import ast

import pytest

from tests.mutants import MUTANTS, ROOT, places


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.reason}")
def test_a_mutant_is_found_once_and_its_test_exists(mutant):
    assert len(places((ROOT / "alignkit" / mutant.file).read_text(encoding="utf-8"), mutant.old)) == 1
    file, _, test = mutant.test.partition("::")
    names = {node.name for node in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef)}
    assert test.partition("[")[0] in names
