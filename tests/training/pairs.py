"""Image-text pairs for tests: pictures whose every pixel tells their number."""

import io
import tarfile

import numpy as np

from dalle.preprocess.images import encode_image

SIZE = 8


def picture(number):
    """A picture whose every pixel tells its number."""
    return np.full((SIZE, SIZE, 3), number, dtype=np.uint8)


def put(folder, name, image=None, text=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is not None:
        path.with_name(f"{path.name}.png").write_bytes(image)
    if text is not None:
        path.with_name(f"{path.name}.txt").write_bytes(text)


def channel_of(folder, num_pairs, captions=1):
    for number in range(num_pairs):
        lines = [f"picture {number}" + " again" * version for version in range(captions)]
        put(folder, f"{number:03}", encode_image(picture(number), "png"), "\n".join(lines).encode())
    return folder


def tar_of(path, members):
    """A tar file of (name, bytes) pairs, or of `tarfile.TarInfo`s without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def members_of(numbers, captions=1):
    """The members of a shard with these pictures, as `channel_of` captions them."""
    for number in numbers:
        lines = [f"picture {number}" + " again" * version for version in range(captions)]
        yield f"{number:03}.png", encode_image(picture(number), "png")
        yield f"{number:03}.txt", "\n".join(lines).encode()
