"""
How the package is built: protobuf modules, BPF objects, and Cython extensions over libbpf.

`pyproject.toml` says what. Tools are looked for before they are used and everything that is missing
is named at once. Switches, set to 1: CLAWKER_CP_BUILD_DEBUG, _ANNOTATE, and _SANITIZE and _COVERAGE,
which imply the first. `tools/toolchain.txt` has the tools, their packages and their overrides.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
from toolchain import INCLUDES, check, output, tool  # noqa: E402 - lies in tools/, beside the package

FAST = Path("src/clawker_cp/_fast")
SHIM = FAST / "bpf_shim.c"
BPF_FLAGS = [
    "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-std=gnu11", "-Wall", "-Werror", "-fno-stack-protector",
    # Debian keeps asm/types.h in the directory of the host's architecture.
    "-DCLAWKER_BPF", "-Ibpf", *[f"-idirafter{path}" for path in INCLUDES[1:]],
]  # fmt: skip
STRICT_C = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
GENERATED_C = ["-std=c11", "-Wall", "-Wextra", "-Wno-unused-parameter"]


def switch(name: str) -> bool:
    return os.environ.get(f"CLAWKER_CP_BUILD_{name}") == "1"


SANITIZE, COVERAGE = switch("SANITIZE"), switch("COVERAGE")
DEBUG = switch("DEBUG") or SANITIZE or COVERAGE
SANITIZERS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"] if SANITIZE else []
TUNING = [*(["-O0", "-g"] if DEBUG else ["-O2"]), *SANITIZERS]


class Generated(Command):
    """A build step whose products are files of the package, in the tree when the install is editable."""

    user_options = [("build-lib=", None, "directory the package is built into")]
    directory = ""

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    @property
    def target(self) -> Path:
        base = ROOT / "src" if self.editable_mode else Path(self.build_lib or "build/lib")
        return base / "clawker_cp" / self.directory

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in has them

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self.target.rglob("*")) if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildBpf(Generated):
    """Compile bpf/*.bpf.c into the package, strip debug information, keep BTF, write the manifest."""

    description = "compile the BPF programs"
    directory = "_bpf"

    def run(self) -> None:
        target = self.target
        target.mkdir(parents=True, exist_ok=True)
        sources = sorted(Path("bpf").glob("*.bpf.c"))
        if self.editable_mode:
            sources += sorted(Path("bpf/tests").glob("*.bpf.c"))
        objects = {}
        for source in sources:
            made = target / source.name.replace(".bpf.c", ".bpf.o")
            clang = [tool("clang"), *BPF_FLAGS, f"-ffile-prefix-map={ROOT}=.", "-c", str(source), "-o", str(made)]
            subprocess.run(clang, check=True)
            subprocess.run([tool("llvm-strip"), "-g", str(made)], check=True)
            objects[made.name] = hashlib.sha256(made.read_bytes()).hexdigest()
        abi = re.search(r"#define CLAWKER_ABI_VERSION (\d+)", Path("bpf/clawker_abi.h").read_text())
        version = output(tool("clang"), "--version").splitlines()[0]
        manifest = {"abi": int(abi[1]) if abi else 0, "clang": version, "objects": objects}
        (target / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        (target / "budget.json").write_bytes(Path("bpf/budget.json").read_bytes())
        print(f"clawker-cp: made {', '.join(objects)}")


class BuildProto(Generated):
    """Generate _proto/ from proto/, under the package's own import path."""

    description = "generate the protobuf and gRPC modules"
    directory = "_proto"

    def run(self) -> None:
        from grpc_tools import protoc

        sources = [f"clawker_cp/_proto/{path.relative_to('proto')}" for path in sorted(Path("proto").rglob("*.proto"))]
        if not sources:
            return
        out = self.target.parent.parent
        self.target.mkdir(parents=True, exist_ok=True)
        include = Path(protoc.__file__).parent / "_proto"
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", "-Iclawker_cp/_proto=proto", f"-I{include}", *outputs, *sources]):
            sys.exit("clawker-cp: protoc refused proto/, see above")
        print(f"clawker-cp: made the modules of {len(sources)} proto files")


class BuildAll(build):
    """The ordinary build, tools checked first, generated parts included."""

    sub_commands = [("build_proto", None), ("build_bpf", None), *build.sub_commands]


class BuildExt(build_ext):
    """The extensions; the hand-written shim is compiled once, under stricter flags than generated C."""

    def build_extensions(self) -> None:
        if any(str(SHIM) in extension.depends for extension in self.extensions):
            flags = [*STRICT_C, *TUNING, *output(tool("pkg-config"), "--cflags", "libbpf").split()]
            objects = self.compiler.compile(
                [str(SHIM)], output_dir=self.build_temp, include_dirs=["bpf", str(FAST)], extra_postargs=flags
            )
            for extension in self.extensions:
                extension.extra_objects += objects if str(SHIM) in extension.depends else []
        super().build_extensions()


def extensions() -> list[Extension]:
    """One per .pyx; Cython's warnings and performance hints are errors, generated C stays out of src/."""
    from Cython.Build import cythonize
    from Cython.Compiler import Options

    Options.warning_errors = True
    made = []
    for source in sorted(FAST.glob("*.pyx")):
        text = source.read_text()
        bridge = "bpf_shim" in text
        libraries = [name for name, used in (("libbpf", bridge), ("libcrypto", "openssl/" in text)) if used]
        linked = output(tool("pkg-config"), "--libs", *libraries).split() if libraries else []
        made.append(
            Extension(
                f"clawker_cp._fast.{source.stem}", [str(source)], include_dirs=["bpf", str(FAST)],
                extra_compile_args=[*GENERATED_C, *TUNING],
                extra_link_args=[*SANITIZERS, *linked],
                depends=["bpf/clawker_abi.h", *([str(SHIM), str(FAST / "bpf_shim.h")] if bridge else [])],
                define_macros=[("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")] if COVERAGE else [],
            )
        )  # fmt: skip
    directives = {"language_level": "3str", "linetrace": COVERAGE}
    said = io.StringIO()
    # Cython's own error switch lets hints pass, so what it says is read.
    with contextlib.redirect_stderr(said):
        made = cythonize(
            made, include_path=["src"], build_dir="build/cython", compiler_directives=directives, quiet=True,
            annotate=switch("ANNOTATE"),
        )  # fmt: skip
    sys.stderr.write(said.getvalue())
    if "performance hint" in said.getvalue():
        sys.exit("clawker-cp: Cython gave performance hints, see above: say the exception contract")
    return made


BUILDING = not {"sdist", "egg_info", "dist_info", "clean"} & set(sys.argv)
if BUILDING:
    versions, missing = check()
    if missing:
        sys.exit("clawker-cp cannot be built; missing or too old:\n" + "\n".join(missing))
    mode = ", ".join(name for name in ("SANITIZE", "COVERAGE", "DEBUG", "ANNOTATE") if switch(name)) or "release"
    print(f"clawker-cp: building ({mode})\nclawker-cp: with {versions}")
setup(
    ext_modules=extensions() if BUILDING else [],
    cmdclass={"build": BuildAll, "build_ext": BuildExt, "build_bpf": BuildBpf, "build_proto": BuildProto},
)
