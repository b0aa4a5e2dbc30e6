"""Generate the stubs of `client/` from the protos, or tell where the committed ones differ from them.

    generate.py                               write the stubs into client/ and the descriptors into build/outrider.binpb
    generate.py --check                       write only the descriptors; exit 1 and name each stub that is not fresh
    generate.py --image OUT [--protos FOLDER] write only the descriptors of FOLDER

The rule: what stands in client/outrider/v1 and client/buf/validate is what this program writes, file by file; a stub
whose proto is gone goes too. protoc comes from `.venv-generate` (an older grpcio-tools, so that the stubs run with the
oldest supported runtimes), the imported protos from the environment that runs this program.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dependencies import dependencies

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
IMAGE = BUILD / "outrider.binpb"
CLIENT = ROOT / "client"
GENERATOR = ROOT / ".venv-generate" / "bin"
PACKAGES = ("outrider/v1", "buf/validate")
RULES = "buf/validate/validate.proto"
STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed stubs")
    parser.add_argument("--image", type=Path, metavar="OUT", help="write only descriptors")
    parser.add_argument("--protos", type=Path, default=ROOT / "protos", metavar="FOLDER")
    options = parser.parse_args(arguments)
    if not (GENERATOR / "python").exists():
        print("There is no .venv-generate: run make generate or make check, which build it.")
        return 2
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="outrider-stubs-") as temporary:
        out = Path(temporary)
        try:
            if options.image:
                write_image(options.protos, options.image, imports=write_imports(out))
                return 0
            write_stubs(out)
        except subprocess.CalledProcessError as failure:
            return int(failure.returncode)  # protoc has said where and why
        if options.check:
            return report(list(differences(out)))
        replace(out)
    return 0


def write_imports(folder: Path) -> Path:
    """The descriptors of what our protos import: protoc needs no proto files but ours, and no network."""
    path = folder / "imports.binpb"
    path.write_bytes(dependencies().SerializeToString())
    return path


def write_image(
    protos: Path, image: Path, *, imports: Path, stub_options: Sequence[str] = ()
) -> None:
    """Compile every proto of ours to one descriptor image with comments, which buf lints and compares."""
    ours = sorted(str(path.relative_to(protos)) for path in protos.glob("outrider/**/*.proto"))
    protoc(
        [
            f"-I{protos}",
            f"--descriptor_set_in={imports}",
            f"--descriptor_set_out={image}",
            "--include_imports",
            "--include_source_info",
            *stub_options,
            *ours,
        ]
    )


def write_stubs(out: Path) -> None:
    imports = write_imports(out)
    write_image(
        ROOT / "protos",
        IMAGE,
        imports=imports,
        stub_options=[
            f"--plugin=protoc-gen-mypy_grpc={GENERATOR / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out=quiet:{out}",
        ],
    )
    protoc([f"--descriptor_set_in={imports}", f"--python_out={out}", f"--pyi_out={out}", RULES])
    # The plugins write these for every proto; without a service there is nothing in them.
    for path in out.glob("outrider/**/*_pb2_grpc.py*"):
        if not path.name.split(".")[0].endswith("_service_pb2_grpc"):
            path.unlink()


def protoc(arguments: Sequence[str]) -> None:
    command = [str(GENERATOR / "python"), "-I", "-m", "grpc_tools.protoc", *arguments]
    subprocess.run(command, check=True)


def stubs(root: Path) -> set[Path]:
    """The generated files below `root`, as paths relative to it."""
    return {
        path.relative_to(root)
        for package in PACKAGES
        for pattern in STUBS
        for path in (root / package).glob(pattern)
    }


def differences(out: Path) -> Iterator[str]:
    fresh, committed = stubs(out), stubs(CLIENT)
    yield from (f"missing: client/{path}" for path in sorted(fresh - committed))
    yield from (f"without a proto: client/{path}" for path in sorted(committed - fresh))
    for path in sorted(fresh & committed):
        if (out / path).read_bytes() != (CLIENT / path).read_bytes():
            yield f"not fresh: client/{path}"


def report(found: Sequence[str]) -> int:
    if found:
        print("\n".join([*found, "Run make generate and commit what it writes."]))
    return 1 if found else 0


def replace(out: Path) -> None:
    fresh = stubs(out)
    for path in stubs(CLIENT) - fresh:
        (CLIENT / path).unlink()
    for path in sorted(fresh):
        shutil.copyfile(out / path, CLIENT / path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
