"""`python -m benchmarks.peers install`: the environment that the Flower peer runs in."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
import venv

from benchmarks.peers import ENVIRONMENT, INSTALLED, REQUIREMENTS, flower_python, requirements_digest

PYTHONS = ((3, 11), (3, 13))  # flwr 1.42 starts at the first, its ray ends at the second
STEP = re.compile(r"^\s*(Collecting|Processing|Ignoring|Installing)\b")  # pip, one line for each requirement


def main() -> int:
    """Parse the command line and do what it says; the exit status is 0 when the environment is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("action", choices=["install", "status"])
    parser.add_argument("--force", action="store_true", help="make the environment again, from nothing")
    options = parser.parse_args()
    if options.action == "install":
        return install(force=options.force)
    print(f"Flower: {flower_python() or 'not installed (python -m benchmarks.peers install)'}")
    return 0 if flower_python() else 1


def install(force: bool = False) -> int:
    """Make `.venv-peers` with the pinned requirements; nothing to do where it already holds them.

    Returns:
        Exit status: 0 when Flower can be run, 1 when not, with the reason on stderr.
    """
    if not force and flower_python():
        print(f"Flower is installed already: {_shown()} ({_version()})")
        return 0
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        print(
            f"Flower 1.42's simulation needs Python 3.11 to 3.13, this is {sys.version.split()[0]}; "
            "benchmarks then report null for it",
            file=sys.stderr,
        )
        return 1
    started = time.monotonic()
    print(f"making {_shown()} (about 500 MB, some minutes on a slow network)", flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    venv.EnvBuilder(with_pip=True).create(ENVIRONMENT)
    status = _pip_install()
    if status:
        print("pip failed; run again with the same command", file=sys.stderr)
        return 1
    INSTALLED.write_text(requirements_digest() + "\n")
    seconds = time.monotonic() - started
    print(f"installed {_version()} into {_shown()} in {seconds:.0f} s; to remove it, delete that folder")
    return 0


def _pip_install() -> int:
    """Run pip, one progress line instead of its output; what it said is shown only when it fails."""
    wanted = sum(1 for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#"))
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--requirement", str(REQUIREMENTS)]
    said: list[str] = []
    seen = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            said.append(line)
            if step := STEP.match(line):
                seen += step[1] != "Installing"
                doing = "installing" if step[1] == "Installing" else "downloading"
                _progress(f"  {min(seen, wanted)}/{wanted} packages, {doing}")
    _progress("")
    if pip.returncode:
        sys.stderr.writelines(said[-20:])
    return pip.returncode


def _progress(line: str) -> None:
    """Rewrite one line on a terminal; elsewhere print only every tenth of them."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="", flush=True)
    elif re.match(r"\s+\d*0/|.*installing$", line):
        print(line, flush=True)


def _version() -> str:
    """Versions of Flower and its Ray in that environment."""
    code = "from importlib.metadata import version as v; print('flwr', v('flwr'), 'with ray', v('ray'))"
    command = [str(ENVIRONMENT / "bin" / "python"), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _shown() -> str:
    return f"{ENVIRONMENT.name}/"


if __name__ == "__main__":
    sys.exit(main())
