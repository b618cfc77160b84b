"""A tour that cannot run says what is missing."""

from __future__ import annotations

import os

import pytest

from clawker_cp.demo import NOT_SUPPORTED, TOOLS, main


def test_what_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ordinary user without the tools reads which ones, and the exit code is that of an unsupported host."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nonexistent")

    code = main()
    said = capsys.readouterr().err

    assert code == NOT_SUPPORTED
    assert "root: " in said
    assert [tool for tool, package in TOOLS.items() if f"{tool}: apt-get install {package}\n" not in said] == []
