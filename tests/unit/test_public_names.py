"""The specified components are importable from the package, and cost nothing until they are used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import clawker_cp


@pytest.mark.parametrize("name", clawker_cp.__all__)
def test_a_public_name_is_the_components_own(name: str) -> None:
    """The same object as in the module that has it, with a docstring that states its contract."""
    module = importlib.import_module(f"clawker_cp.{clawker_cp._MODULES[name]}")
    assert getattr(clawker_cp, name) is getattr(module, name)
    assert getattr(clawker_cp, name).__doc__
    assert name in dir(clawker_cp)


def test_the_lists_agree() -> None:
    """What is announced can be loaded, and nothing else is there."""
    assert sorted(clawker_cp._MODULES) == sorted(clawker_cp.__all__)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = clawker_cp.nothing_of_that_name


def test_importing_the_package_imports_nothing_dear() -> None:
    """A command line that only prints its version does not wait for gRPC and httpx."""
    code = "import clawker_cp, sys; print([name for name in ('grpc', 'httpx', 'structlog') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
