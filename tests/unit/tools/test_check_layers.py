"""The structure check finds what it says it finds, and the repository passes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def layers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_layers", ROOT / "tools" / "check_layers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("dns/gate.py", "from clawker_cp.firewall.plan import Plan", "domain packages do not know each other"),
        ("dns/gate.py", "from clawker_cp.app import run", "arrows point down only"),
        ("runtime/tasks.py", "import clawker_cp.ebpf.manager", "arrows point down only"),
        ("dns/gate.py", "from clawker_cp import _pure", "go through accel"),
        ("app.py", "from clawker_cp.testing import world", "go through demo"),
        ("firewall/store.py", "import grpc.aio", "only rpc/"),
        ("engines/host/engine.py", "def f():\n    import docker", "only engines/docker_client.py"),
        ("odd/thing.py", "", "no place among the layers"),
    ],
)
def test_wrong_imports_are_found(layers: ModuleType, tmp_path: Path, module: str, line: str, said: str) -> None:
    """An import against the direction is one line that names the module and the rule."""
    path = tmp_path / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    problems = list(layers.check_imports(tmp_path))

    assert len(problems) == 1, problems
    assert problems[0].startswith(module)
    assert said in problems[0]


def test_right_imports_pass(layers: ModuleType, tmp_path: Path) -> None:
    """Downward imports, own package and the guarded fronts are silent."""
    good = {
        "dns/gate.py": "from clawker_cp.accel import NameMatcher\nfrom clawker_cp.dns.judge import Judge\n",
        "app.py": "from clawker_cp.dns import Gate\nfrom clawker_cp import config\n",
        "accel.py": "from clawker_cp._fast import names\n",
        "testing/world.py": "from clawker_cp.app import run\nimport grpc\n",
    }
    for module, text in good.items():
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).write_text(text)

    assert list(layers.check_imports(tmp_path)) == []


def test_long_and_vaguely_named_files_are_found(layers: ModuleType, tmp_path: Path) -> None:
    """A file over its limit, a name that says nothing, and a module without a test are each one line."""
    source = tmp_path / "src" / "clawker_cp" / "dns"
    source.mkdir(parents=True)
    (source / "gate.py").write_text("\n" * 501)
    (source / "utils.py").write_text("")

    assert [line.partition(":")[0] for line in layers.check(tmp_path)] == [
        "dns/gate.py", "dns/utils.py", "dns/gate.py", "dns/utils.py",
    ]  # fmt: skip


def test_this_repository_passes(layers: ModuleType) -> None:
    """Nothing in the repository breaks the structure."""
    assert layers.check(ROOT) == []
