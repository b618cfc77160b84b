"""
The commands that README and the help show, run as they are written, but for what only a reader can fill in.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from clawker_cp.cli.run import RUN_HELP
from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "clawker-cp": "clawker_cp",
    "clawkerctl": "clawker_cp.cli.ctl.main",
    "ebpf-manager": "clawker_cp.cli.ebpf_manager",
}
COMMAND = re.compile(r"^\s+(?:sudo )?(?:\.venv/bin/)?((?:clawker-cp|clawkerctl|ebpf-manager) .*)$", re.MULTILINE)


def examples(text: str) -> list[list[str]]:
    """Command lines as words, comments left out."""
    return [shlex.split(line, comments=True) for line in COMMAND.findall(text)]


def argv(words: list[str], workdir: str) -> list[str]:
    program = [sys.executable, "-m", PROGRAMS[words[0]]]
    if words[1] == "run":
        # What stands for a reader's own program is one that ends.
        return [*program, "run", "--workdir", workdir, *words[2 : words.index("--") + 1], "true"]
    return [*program, *(word for word in words[1:] if word != "--follow")]


README = examples((ROOT / "README.md").read_text())
RUNS = [words for words in [*README, *examples(RUN_HELP)] if words[:2] == ["clawker-cp", "run"]]
# Those of the container need an engine: test_container_life.py runs them.
CALLS = [words for words in README if words[0] != "clawker-cp" and words[1] not in {"up", "down"}]


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
async def test_a_run_that_is_shown_works(machine: Machine, words: list[str]) -> None:
    """The options of each example are taken, and its command is run."""
    done = await machine.host.run(argv(words, str(machine.workdir)), env=machine.environment, timeout_s=60)

    assert done.code == 0, done.err


async def test_calls_that_are_shown_work(machine: Machine) -> None:
    """Against a server, in the order they are shown."""
    async with serving(machine):
        for words in CALLS:
            done = await machine.host.run(argv(words, str(machine.workdir)), env=machine.environment, timeout_s=60)

            assert done.code == 0, (words, done.err)
    assert len(RUNS) >= 5 and len(CALLS) >= 4
