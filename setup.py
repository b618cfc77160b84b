"""
How the package is built: Cython extensions over libbpf, and the BPF object.

`pyproject.toml` says what. Tools are looked for before they are used and everything that is
missing is named at once. CLAWKER_CP_BUILD_CLANG and CLAWKER_CP_BUILD_LLVM_STRIP override tools,
CLAWKER_CP_BUILD_DEBUG=1 builds extensions with -O0 -g.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FAST = Path("src/clawker_cp/_fast")
BPF_FLAGS = [
    "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-std=gnu11", "-Wall", "-Werror", "-fno-stack-protector",
    "-DCLAWKER_BPF", "-Ibpf",
    # Debian keeps asm/types.h in the directory of the host's architecture.
    *[f"-idirafter{path.parent}" for path in Path("/usr/include").glob("*-linux-gnu/asm")],
]  # fmt: skip
TOOLS = {
    "clang": ("CLAWKER_CP_BUILD_CLANG", "clang"),
    "llvm-strip": ("CLAWKER_CP_BUILD_LLVM_STRIP", "llvm"),
    "pkg-config": ("CLAWKER_CP_BUILD_PKG_CONFIG", "pkg-config"),
}


def tool(name: str) -> str:
    return os.environ.get(TOOLS[name][0], name)


def check_tools() -> None:
    """Name everything that is missing at once, with the Debian package that has it."""
    missing = [
        f"  {name}: install the Debian package {package}, or set {variable}"
        for name, (variable, package) in TOOLS.items()
        if shutil.which(tool(name)) is None
    ]
    if not any("pkg-config" in line for line in missing):
        probe = subprocess.run([tool("pkg-config"), "--exists", "libbpf >= 1.1"], check=False)
        if probe.returncode != 0:
            missing.append("  libbpf 1.1 or later: install the Debian packages libbpf-dev libelf-dev zlib1g-dev")
    if missing:
        sys.exit("clawker-cp cannot be built, these are missing:\n" + "\n".join(missing))


def pkg_config(*arguments: str) -> list[str]:
    return subprocess.run([tool("pkg-config"), *arguments], check=True, capture_output=True, text=True).stdout.split()


class BuildBpf(Command):
    """Compile bpf/*.bpf.c into the package, strip debug information, keep BTF, write the manifest."""

    description = "compile the BPF programs"
    user_options = [("build-lib=", None, "directory the package is built into")]

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def _target(self) -> Path:
        base = ROOT / "src" if self.editable_mode else Path(self.build_lib or "build/lib")
        return base / "clawker_cp" / "_bpf"

    def run(self) -> None:
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        sources = sorted(Path("bpf").glob("*.bpf.c"))
        if self.editable_mode:
            sources += sorted(Path("bpf/tests").glob("*.bpf.c"))
        objects = {}
        for source in sources:
            output = target / source.name.replace(".bpf.c", ".bpf.o")
            subprocess.run(
                [tool("clang"), *BPF_FLAGS, f"-ffile-prefix-map={ROOT}=.", "-c", str(source), "-o", str(output)],
                check=True,
            )
            subprocess.run([tool("llvm-strip"), "-g", str(output)], check=True)
            objects[output.name] = hashlib.sha256(output.read_bytes()).hexdigest()
        abi = re.search(r"#define CLAWKER_ABI_VERSION (\d+)", Path("bpf/clawker_abi.h").read_text())
        clang = subprocess.run([tool("clang"), "--version"], check=True, capture_output=True, text=True).stdout
        manifest = {"abi": int(abi[1]) if abi else 0, "clang": clang.splitlines()[0], "objects": objects}
        (target / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        print(f"clawker-cp: {manifest['clang']}; BPF objects: {', '.join(objects)}")

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted(Path("bpf").rglob("*.[ch]"))]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self._target().glob("*")) if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildAll(build):
    """The ordinary build, tools checked first, BPF included."""

    sub_commands = [("build_bpf", None), *build.sub_commands]

    def run(self) -> None:
        check_tools()
        super().run()


class BuildExt(build_ext):
    """Cython at build time, its warnings and performance hints fatal, generated C outside src/."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = None

    def build_extensions(self) -> None:
        check_tools()
        super().build_extensions()


def extensions() -> list[Extension]:
    from Cython.Build import cythonize

    debug = os.environ.get("CLAWKER_CP_BUILD_DEBUG") == "1"
    flags = ["-O0", "-g"] if debug else ["-O2"]
    made = []
    for source in sorted(FAST.glob("*.pyx")):
        uses_libbpf = "bpf_shim" in source.read_text()
        made.append(
            Extension(
                f"clawker_cp._fast.{source.stem}",
                [str(source), *([str(FAST / "bpf_shim.c")] if uses_libbpf else [])],
                include_dirs=["bpf", str(FAST)],
                extra_compile_args=[*flags, "-std=c11", "-Wall", "-Wextra", "-Wno-unused-parameter",
                                    *(pkg_config("--cflags", "libbpf") if uses_libbpf else [])],
                extra_link_args=pkg_config("--libs", "libbpf") if uses_libbpf else [],
                depends=["bpf/clawker_abi.h", str(FAST / "bpf_shim.h")] if uses_libbpf else [],
            )
        )  # fmt: skip
    return cythonize(
        made, include_path=["src"], build_dir="build/cython", compiler_directives={"language_level": "3str"}, quiet=True
    )  # fmt: skip


if "sdist" not in sys.argv and "egg_info" not in sys.argv:
    check_tools()
setup(
    ext_modules=extensions() if "sdist" not in sys.argv and "egg_info" not in sys.argv else [],
    cmdclass={"build": BuildAll, "build_ext": BuildExt, "build_bpf": BuildBpf},
)
