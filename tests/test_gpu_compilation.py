"""Every kernel compiles for a GPU, as it would be launched there, with registers and memory that a GPU has.

Triton needs no GPU to compile for one, but an interpreted kernel is never compiled: so another process does it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes on compute capability 9.0: of shared memory in a multiprocessor; and of a thread's numbers that find no register
# and go back and forth, of which a few are nothing beside the loads of a tile.
SHARED, SPILLED = 227 * 1024, 128
KERNELS = ("_parts", "_merge", "_step", "_normal", "_argmax", "_best_path")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the compiler says of each kernel."""
    triton = pytest.importorskip("triton", reason="no triton on this platform")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this triton compiles for no NVIDIA GPU")
    cache = str(tmp_path_factory.mktemp("triton"))  # an empty one, for what is found in a cache tells no registers
    settings = {
        "TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    run = subprocess.run([sys.executable, __file__], env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_kernel_compiles_for_a_gpu(compiled):
    assert {kernel["name"] for kernel in compiled} == set(KERNELS)


def test_no_kernel_needs_more_than_a_gpu_has(compiled):
    assert not [kernel for kernel in compiled if kernel["shared"] * kernel["programs"] > SHARED]
    if not any(kernel["registers"] for kernel in compiled):
        pytest.skip("this Triton doesn't tell what is spilled")
    assert not [kernel for kernel in compiled if kernel["spilled"] > SPILLED]


# ----------------------------------------------------------------------------------------------- the other process


def compile_all():
    """Launches everything in sizes that are in use, on a GPU that isn't there."""
    import contextlib
    import io
    import re
    from functools import partial

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from embdiff import kernels

    class Absent:
        """The driver of a Hopper GPU without the GPU."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    found, programs = {}, [1]

    def compile_only(launch, *args, **options):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = launch(*args, **options | {"warmup": True})
        if kernel.hash in found:
            return
        text = log.getvalue()
        found[kernel.hash] = {
            "name": kernel.metadata.name, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps,
            "stages": kernel.metadata.num_stages, "programs": programs[0],
            "registers": max(map(int, re.findall(r"Used (\d+) registers", text)), default=None),
            "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", text))), "case": case,
        }  # fmt: skip

    driver.set_active(Absent())
    for name in KERNELS:
        kernel = getattr(kernels, name)
        kernel.run = partial(compile_only, kernel.run)
    kernels._processors = lambda device: 132
    kernels._has_tf32 = lambda device: True
    kernels.thin = lambda device: 4

    bf16, fp32 = torch.bfloat16, torch.float32
    words, keep = 1001, torch.tensor([0, 2])
    cases = [(rows, bf16, 896, 128, 0.7) for rows in (16, 64, 1024)] + [
        (rows, fp32, 896, 128, 0.7) for rows in (16, 64)
    ]
    for rows, dtype, H, D, temperature in [*cases, (1024, bf16, 320, 64, 0.7), (1024, bf16, 896, 128, 1.0)]:
        case = f"{rows} rows, {dtype}, H {H}, D {D}, T {temperature}"
        h, weight, table = (torch.zeros(shape, dtype=dtype) for shape in ((rows, H), (words, H), (words, D)))
        programs[0] = kernels.tile(rows, dtype).programs
        kernels.argmax(h, weight)
        parts = kernels.parts(h, weight, table, temperature, keep)
        programs[0] = 1
        if rows == 64 or D == 64:
            z, seeds, row = torch.zeros(1, rows, D), torch.zeros(1, dtype=torch.int64), torch.zeros(8)
            lengths = kernels.Lengths(torch.zeros(1), torch.zeros(2, D))
            kernels.expectation(h, weight, table, temperature, keep)
            kernels.normal(seeds, 0, rows, D)
            both = kernels.Parts(
                *(t.repeat(1, 2, *[1] * (t.ndim - 2)) for t in parts[:4]), parts.kept.repeat(2, 1), 1.4
            )
            for draw in (-1, 3):
                for scale, made in ((None, parts), (2.0, both)):
                    kernels.step(made, z, (z, z), row, lengths, seeds, draw, scale, z, z)
    case = "32 candidates"
    kernels.best_path(torch.zeros(2, 64, 32), torch.zeros(2, 63, 32, 32))
    print(json.dumps(list(found.values())))


if __name__ == "__main__":
    compile_all()
