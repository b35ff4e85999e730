"""The farspan package as one plain folder, so that a cluster where it is not installed can import it.

In a checkout the package is a folder of links; Ray's own packaging follows them, but would also take caches and
whatever else lies there. A staged copy is small (well under a MiB), is what is hashed and uploaded, and its size can
be told before anything is sent.
"""

from __future__ import annotations

import shutil
from pathlib import Path

IGNORED = ("__pycache__", "*.pyc", ".*")


def package_root() -> Path:
    """Folder that has to be on `sys.path` for `import farspan`: `infra/py` of a checkout, or site-packages."""
    import farspan

    return Path(next(iter(farspan.__path__))).absolute().parent


def stage_package(into: Path) -> Path:
    """Copy the package, links followed, to `into/farspan` and return that folder."""
    staged = into / "farspan"
    shutil.copytree(package_root() / "farspan", staged, symlinks=False, ignore=shutil.ignore_patterns(*IGNORED))
    return staged


def file_sizes(folder: Path) -> dict[Path, int]:
    """Bytes of every file below `folder`, keyed by its path relative to `folder`."""
    return {
        path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip
