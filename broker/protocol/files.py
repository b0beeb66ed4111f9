"""Reading what a person names: never more of a file than it may hold, and a sentence for what the system refuses."""

import errno
from pathlib import Path
from typing import Final

_PIECE_BYTES: Final = 65_536


def read_file(path: Path, most_bytes: int) -> bytes:
    """The whole content. Raises OSError, with EFBIG for more than `most_bytes`, also of a device that never ends."""
    raw = bytearray()
    with path.open("rb") as file:
        # In pieces, because Python reserves as much as it is told to read, and an agent has little.
        while len(raw) <= most_bytes and (piece := file.read(_PIECE_BYTES)):
            raw += piece
    if len(raw) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes, so it is something else", str(path))
    return bytes(raw)


def reason_of(error: Exception) -> str:
    """Why something failed, in a few words: of an OSError without its number and the path, which the sentence names."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def refused_by_system(error: OSError) -> str:
    """What the system refused, and what to do about it."""
    if error.strerror is None:
        return reason_of(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {_NEXT.get(error.errno or 0, 'check the path, and who may read and write there')}"


_NEXT: Final = {
    errno.EFBIG: "give the right file",
    errno.EEXIST: "nothing takes its place: give another name, or move it away",
    errno.EISDIR: "give a file",
    errno.ENOENT: "check the path, and that its directory is there",
    errno.ENOSPC: "free disk space",
    errno.EROFS: "give a path on a disk that can be written",
}
