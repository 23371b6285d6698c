"""Build hook: generates csi_quobyte/pb from proto/*.proto whenever the package is built or installed."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "csi_quobyte/pb"


def generate(root: Path) -> None:
    """Write Python stubs (messages, services, type hints) for every proto file into `root`/csi_quobyte/pb.

    The virtual path makes protoc emit imports of `csi_quobyte.pb.x_pb2`, so that the stubs work inside the package.

    Raises:
        RuntimeError: protoc refused a file; its message is on standard error.
    """
    out = root / PACKAGE
    out.mkdir(exist_ok=True)
    (out / "__init__.py").write_text('"""Generated from proto/ when the package is built; do not edit."""\n')
    names = sorted(path.name for path in (root / "proto").glob("*.proto"))
    arguments = [
        "protoc",
        f"-I{PACKAGE}={root / 'proto'}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--pyi_out={root}",
        *(f"{PACKAGE}/{name}" for name in names),
    ]
    if status := protoc.main(arguments):
        raise RuntimeError(f"protoc ended with {status}")


class StubsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs `generate` before the wheel (also an editable one) is assembled."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the interface's names
        generate(Path(self.root))


if __name__ == "__main__":
    generate(Path(__file__).resolve().parent.parent)
