#!/usr/bin/env python3
"""Entry point of the image: log versions and hardware, then run `train` or `serve`.

The first lines of the log name versions, processors, memory, driver and GPU. They are written
before torch is imported, so that they are there however the command ends. Where CUDA cannot start
they give the cause and the remedy; the command then runs on the CPU, unless DALLE_DEVICE=cuda asks
for a GPU. Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

COMMANDS = {"train": "training", "serve": "inference"}
"""Each command's package, run as by `python -m`."""

PACKAGES = ("torch", "nvidia-cuda-runtime-cu12", "numpy", "deepspeed", "gunicorn")
OLDEST_CUDA = 12_000
"""Oldest CUDA version of a driver that runs CUDA 12.8, as cuDriverGetVersion returns it."""
OLDEST_DRIVER = 525
PROBE_SECONDS = 60
NO_DEVICE = 100
UPDATE = (
    "on an endpoint choose hosts with a newer driver by InferenceAmiVersion="
    "al2-ami-sagemaker-inference-gpu-3-1 in the endpoint configuration's production variant"
)


@dataclass
class Cuda:
    """Driver and GPUs of the host.

    library: libcuda.so.1 can be loaded. driver: the kernel module's version, as in "550.163.01".
    cuda: newest CUDA that the driver supports, as cuDriverGetVersion returns it (12040 is 12.4).
    error, error_name: result of cuInit or of counting the devices; 0 when CUDA starts.
    """

    library: bool = False
    driver: str = ""
    cuda: int = 0
    error: int = 0
    error_name: str = ""
    devices: tuple[str, ...] = ()


def main() -> int:
    """Run the command named by the first argument, or by the name that this file was called by."""
    # The first process of a container ignores SIGTERM by default: this handler stays until the
    # command sets one.
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
    # Not os.exec: it would reset SIGTERM to the default, which the first process of a container
    # ignores, for as long as the command takes to start.
    runpy.run_module(COMMANDS[called_as], run_name="__main__", alter_sys=True)
    return 0


def versions() -> str:
    """Return the versions of Python and PACKAGES, none of them imported, and the git revision."""
    from dalle.versions import versions_line  # not on the probe's path

    return f"{versions_line(PACKAGES)} revision={os.environ.get('DALLE_GIT_REVISION', 'unknown')}"


def host() -> str:
    """Return kernel, processors, memory, the sizes of /dev/shm and /tmp, and the user."""
    from dalle.platform.limits import memory_limit  # not on the probe's path

    parts = [f"kernel={platform.release()}", f"cpus={len(os.sched_getaffinity(0))}"]
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parts.append(f"memory={_size(min(installed, memory_limit() or installed))}")
    parts += [f"{d}={_size(shutil.disk_usage(d).total)}" for d in ("/dev/shm", "/tmp")]  # noqa: S108
    return " ".join([*parts, f"user={os.getuid()}:{os.getgid()}"])


def why_no_cuda(cuda: Cuda) -> str:
    """Return why CUDA cannot start and what to change; empty when it can."""
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
    """Query the driver in a separate process: after cuInit no forked worker could use a GPU."""
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
    """Load libcuda and read its version and devices."""
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
    """Describe a device, as in "NVIDIA A10G (compute 8.6, 22.1 GiB)"."""
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
    """Return the kernel module's version; empty without one."""
    words = _read(Path("/proc/driver/nvidia/version")).partition("\n")[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


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
    from dalle.platform.environment import DEFAULT_ROOT, Paths
    from dalle.platform.outputs import write_failure

    root = arguments[arguments.index("--root") + 1] if "--root" in arguments[:-1] else DEFAULT_ROOT
    write_failure(Paths(Path(root)), cause)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--probe"]:
        print(json.dumps(asdict(ask_driver())))
        sys.exit(0)
    sys.exit(main())
