"""The room as a whole: its names are complete, its examples are true."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from grn_lightning import functional

MODULES = [module.name for module in pkgutil.iter_modules(functional.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_is_exported_with_a_docstring(name):
    module = importlib.import_module(f"grn_lightning.functional.{name}")
    for public, member in inspect.getmembers(module):
        is_own = getattr(member, "__module__", None) == module.__name__
        if is_own and not public.startswith("_"):
            assert getattr(functional, public) is member
            assert inspect.getdoc(member)


@pytest.mark.parametrize("name", MODULES)
def test_every_example_is_true(name):
    module = importlib.import_module(f"grn_lightning.functional.{name}")
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_there_are_examples_to_test():
    modules = [importlib.import_module(f"grn_lightning.functional.{name}") for name in MODULES]
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for module in modules for test in finder.find(module) if test.examples]
    assert len(examples) >= 20
