"""Runs the benchmarks, each in a fresh process, so that none inherits threads, caches or memory of another.

    python -m benchmarks [NAME ...]

A benchmark is a script in this folder that prints what it measured; the first line of its docstring is its
title. Scripts called ``fuzz_*`` and ``check_*`` are not benchmarks: ``make fuzz``, ``make check-resume`` and
``make check-same`` run them. Those that take long run only if they are named.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import machine

FOLDER = Path(__file__).parent
LONG = ("attacks", "soak")


def benchmarks() -> dict[str, Path]:
    """The scripts by name."""
    return {
        path.stem: path
        for path in sorted(FOLDER.glob("*.py"))
        if not path.stem.startswith(("_", "fuzz_", "check_")) and path.stem != "report"
    }


def title(path: Path) -> str:
    """First line of a script's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
    return doc.splitlines()[0]


def main() -> int:
    scripts = benchmarks()
    about = "\n".join(f"  {name}: {title(path)}" for name, path in scripts.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Run benchmarks, all but {' and '.join(LONG)} unless some are named.",
        epilog=f"benchmarks:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names or [name for name in scripts if name not in LONG]
    if unknown := [name for name in names if name not in scripts]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(scripts)}")
    print(machine(), flush=True)
    failed = []
    for name in names:
        print(f"\n== {name}: {title(scripts[name])}\n", flush=True)
        started = time.monotonic()
        # As a module: scripts may import each other and benchmarks.report.
        ended = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=FOLDER.parent, check=False)
        print(f"-- {time.monotonic() - started:.0f} s", flush=True)
        if ended.returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
