"""Headers of tar archives that others wrote."""

from __future__ import annotations

import tarfile

MAX_EXTENDED_HEADER_BYTES = 1 << 20
MAX_EXTENDED_HEADERS = 64  # in a row; writers put one or two before a member

TAR_ERRORS = (
    tarfile.TarError,
    # Of tarfile's parsers, for numbers, names and dates that are none.
    ValueError,
    OverflowError,
    EOFError,
    MemoryError,
)
"""What reading an archive of any content may raise, besides OSError and zlib.error."""

_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BoundedTarInfo(tarfile.TarInfo):
    """A member whose header cannot take the reader's time or memory: tarfile.open(tarinfo=...).

    tarfile reads extended headers whole, whatever size they state, and one within the other. A
    negative size leads it back to members that it has read, for ever (CVE-2025-8194, Python before
    3.11.14).
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError(f"the member {self.name[:80]!r} has the size {self.size}")
        row = getattr(archive, "extended_headers", 0) + 1 if self.type in _EXTENDED else 0
        archive.extended_headers = row  # type: ignore[attr-defined] # ours, beside tarfile's
        if row > MAX_EXTENDED_HEADERS:
            raise tarfile.ReadError(
                f"more than {MAX_EXTENDED_HEADERS} extended headers follow one another"
            )
        if self.type in _EXTENDED and self.size > MAX_EXTENDED_HEADER_BYTES:
            raise tarfile.ReadError(
                f"an extended header has {self.size:,} bytes, more than "
                f"{MAX_EXTENDED_HEADER_BYTES:,}"
            )
        return super()._proc_member(archive)  # type: ignore[misc, no-any-return]
