#!/usr/bin/env python3
"""The image's entry point: says what it runs on, then becomes `train` or `serve`.

The first lines of the log name versions, processors, memory, driver and GPU, before torch is
imported, so that they stand there however badly the rest goes. Where CUDA cannot start they say why
and what to change; the command then runs on the CPU, unless DALLE_DEVICE=cuda asks for a GPU.
Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

COMMANDS = ("train", "serve")
PACKAGES = ("torch", "nvidia-cuda-runtime-cu12", "numpy", "deepspeed", "gunicorn")
OLDEST_CUDA = 12_000
"""What a driver must offer at least for CUDA 12.8 to run, as cuDriverGetVersion counts."""
OLDEST_DRIVER = 525
PROBE_SECONDS = 60
NO_DEVICE = 100
UPDATE = (
    "on an endpoint choose hosts with a newer driver by InferenceAmiVersion="
    "al2-ami-sagemaker-inference-gpu-3-1 in the endpoint configuration's production variant"
)


@dataclass
class Cuda:
    """What the host offers.

    library: libcuda.so.1 could be loaded. driver: such as "550.163.01", from the kernel module.
    cuda: the newest CUDA of the driver, as cuDriverGetVersion counts it (12040 is 12.4).
    error, error_name: of cuInit or of counting the devices; 0 when CUDA starts.
    """

    library: bool = False
    driver: str = ""
    cuda: int = 0
    error: int = 0
    error_name: str = ""
    devices: tuple[str, ...] = ()


def main() -> int:
    """Run the command that the arguments (or the name this file was called by) choose."""
    # The first process of a container has no default for SIGTERM: without this it would be ignored
    # until the command sets its own.
    signal.signal(signal.SIGTERM, _leave)
    called_as = Path(sys.argv[0]).name
    arguments = sys.argv[1:]
    if called_as not in COMMANDS:
        called_as, arguments = (arguments or ["train"])[0], arguments[1:]
    if called_as not in COMMANDS:
        print(
            f"the command must be one of {', '.join(COMMANDS)}, got {called_as!r}; "
            "for anything else give --entrypoint",
            file=sys.stderr,
        )
        return 2
    wanted = os.environ.get("DALLE_DEVICE", "auto")
    cuda = probe()
    _say(f"{called_as} {versions()}")
    _say(f"host {host()}")
    problem = why_no_cuda(cuda)
    if not problem:
        _say(f"GPU: driver {cuda.driver or 'unknown'}, {', '.join(cuda.devices)}")
    elif wanted.startswith("cuda"):
        _say(f"GPU: DALLE_DEVICE={wanted}, but {problem}")
        if called_as == "train":
            _write_failure(arguments, f"DALLE_DEVICE={wanted}, but {problem}")
        return 1
    else:
        _say(f"GPU: none is used: {problem}")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch need not find out again
    sys.argv = [called_as, *arguments]
    if called_as == "train":
        from training.__main__ import main as train

        return train()
    from inference.__main__ import main as serve

    return serve()


def versions() -> str:
    """Of this code, Python and what decides whether a GPU works; imports nothing of them."""
    from dalle.versions import versions_line  # not on the probe's path

    return f"{versions_line(PACKAGES)} revision={os.environ.get('DALLE_GIT_REVISION', 'unknown')}"


def host() -> str:
    """Kernel, processors, memory and the sizes of /dev/shm and /tmp."""
    parts = [f"kernel={platform.release()}", f"cpus={len(os.sched_getaffinity(0))}"]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parts.append(f"memory={_size(min([pages, *_memory_limits()]))}")
    parts += [f"{d}={_size(shutil.disk_usage(d).total)}" for d in ("/dev/shm", "/tmp")]  # noqa: S108
    return " ".join([*parts, f"user={os.getuid()}:{os.getgid()}"])


def why_no_cuda(cuda: Cuda) -> str:
    """Why CUDA cannot start here and what to change; empty when it can."""
    if not cuda.library and not cuda.driver:
        return (
            "the host has no NVIDIA driver (a CPU instance), "
            "or docker was started without --gpus all"
        )
    driver = f"the host's NVIDIA driver {cuda.driver or 'of unknown version'}"
    if not cuda.library:
        return f"{driver} is not mounted into the container: start docker with --gpus all"
    if 0 < cuda.cuda < OLDEST_CUDA:
        newest = f"{cuda.cuda // 1000}.{cuda.cuda % 1000 // 10}"
        needed = f"CUDA 12 (driver {OLDEST_DRIVER} or later)"
        return f"{driver} offers CUDA {newest}, and this image needs {needed}: {UPDATE}"
    if cuda.error == NO_DEVICE or (not cuda.error and not cuda.devices):
        visible = os.environ.get("NVIDIA_VISIBLE_DEVICES", "unset")
        return f"{driver} shows no GPU to this container (NVIDIA_VISIBLE_DEVICES is {visible})"
    if cuda.error:
        return (
            f"{driver} does not start CUDA: {cuda.error_name or 'error'} ({cuda.error}); {UPDATE}"
        )
    return ""


def probe() -> Cuda:
    """Ask the driver, in a process of its own: after cuInit no forked worker could use a GPU."""
    try:
        answer = subprocess.run(  # noqa: S603
            [sys.executable, "-I", "-S", __file__, "--probe"],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        ).stdout
        found = json.loads(answer)
        return Cuda(**found | {"devices": tuple(found["devices"])})
    except subprocess.TimeoutExpired:
        return Cuda(True, _driver(), 0, -1, f"no answer within {PROBE_SECONDS} seconds")
    except (subprocess.CalledProcessError, ValueError) as error:
        return Cuda(True, _driver(), 0, -1, f"the probe failed, {type(error).__name__}")


def ask_driver() -> Cuda:
    """Load libcuda and ask it for its version and its devices."""
    cuda = Cuda(driver=_driver())
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return cuda
    cuda.library = True
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
        cuda.cuda = number.value
    cuda.error = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(number))
    if cuda.error:
        name = ctypes.c_char_p()
        if library.cuGetErrorName(cuda.error, ctypes.byref(name)) == 0 and name.value:
            cuda.error_name = name.value.decode()
        return cuda
    cuda.devices = tuple(_device(library, index) for index in range(number.value))
    return cuda


def _device(library: ctypes.CDLL, index: int) -> str:
    """Such as "NVIDIA A10G (compute 8.6, 22.1 GiB)"."""
    device = ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t()
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return f"{name.value.decode()} (compute {'.'.join(capability)}, {_size(memory.value)})"


def _driver() -> str:
    """The version of the kernel's module; empty without one."""
    words = _read(Path("/proc/driver/nvidia/version")).partition("\n")[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


def _memory_limits() -> list[int]:
    """Of this container, in bytes; cgroup version 2 and 1."""
    names = ("memory.max", "memory/memory.limit_in_bytes")
    texts = [_read(Path("/sys/fs/cgroup") / name) for name in names]
    return [int(text) for text in texts if text.isdigit()]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _size(count: int) -> str:
    return f"{count / 2**30:.1f}GiB"


def _say(line: str) -> None:
    print(f"container: {line}", file=sys.stderr, flush=True)


def _write_failure(arguments: list[str], cause: str) -> None:
    from dalle.platform.environment import DEFAULT_ROOT, Paths, write_failure

    root = arguments[arguments.index("--root") + 1] if "--root" in arguments[:-1] else DEFAULT_ROOT
    write_failure(Paths(Path(root)), cause)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--probe"]:
        print(json.dumps(asdict(ask_driver())))
        sys.exit(0)
    sys.exit(main())
