"""Files that are written whole or not at all."""

import json
import os
import pathlib

from icm_jax.errors import IcmError


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, and the folders above it; until all is on the disk an older one stays.

    Raises: IcmError if it cannot be written (full disk, missing rights).
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise IcmError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # what stopped the writing stops this too
            pass


def write_json(path: str | os.PathLike, content) -> None:
    """Writes JSON, keys sorted, as `write_whole` does."""
    write_whole(path, json.dumps(content, indent=1, sort_keys=True).encode())
