"""Seconds of our own in `import embdiff`, and of `embdiff --help`: medians over fresh processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(code: str) -> float:
    """Wall time of one fresh interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def median(code: str, rounds: int = 9) -> float:
    """The median over some rounds, after one to warm the file cache."""
    seconds(code)
    return statistics.median(seconds(code) for _ in range(rounds))


if __name__ == "__main__":
    bare = median("pass")
    figures = {
        "import_embdiff_s": round(median("import embdiff") - bare, 3),
        "embdiff_help_s": round(
            median("import sys; sys.argv=['embdiff','--help']; from embdiff.cli import main; main()"), 3
        ),
        "bare_interpreter_s": round(bare, 3),
        "machine": platform.machine(),
    }
    Path("benchmarks/results/startup.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
