"""`xcloud clusters`: check cluster files, and bring clusters up and down through Ray's launcher or kubectl."""

from __future__ import annotations

import json
import os
import shlex
import subprocess  # nosec B404
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from xcloud.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from xcloud.cloud.cluster_file import ClusterFile, Problem
    from xcloud.cloud.node_types import NodeType

__all__ = ["clusters"]

FOLDER = Path("clusters")

clusters = typer.Typer(
    help="Check cluster files, offline, and bring clusters up and down.", no_args_is_help=True
)

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="Cluster file: Ray's cluster launcher, or KubeRay.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the commands, and run none.")]
Jobs = Annotated[
    list[Path] | None,
    typer.Option("--job", metavar="JOB", help="A job that is to run there. Repeatable."),
]
Prices = Annotated[
    Path | None,
    typer.Option("--prices", metavar="FILE", help="Your price file, with instance types that it adds."),
]
Crds = Annotated[
    Path | None,
    typer.Option(
        "--crds",
        metavar="DIR",
        help="KubeRay's *crd*.yaml files. Default: XCLOUD_KUBERAY_CRDS; without them that part is skipped.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON on standard output, and nothing else.")]


@clusters.command()
def validate(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Default: all of clusters/.")
    ] = None,
    jobs: Jobs = None,
    prices: Prices = None,
    crds: Crds = None,
    as_json: Json = False,
) -> None:
    """Check cluster files, alone and against jobs. Calls no cloud. Exit code 2 if one is wrong."""
    found = [_checked(file, jobs or (), prices, crds) for file in files or _shipped()]
    if as_json:
        typer.echo(json.dumps([_record(*one) for one in found], allow_nan=False))
    else:
        for cluster, problems, warnings in found:
            _show(cluster, problems, warnings, jobs or ())
    if any(problems for _, problems, _ in found):
        raise typer.Exit(2)


@clusters.command()
def up(
    file: File,
    yes: Yes = False,
    dry_run: DryRun = False,
    jobs: Jobs = None,
    prices: Prices = None,
    crds: Crds = None,
    rayjobs: Annotated[
        bool, typer.Option("--rayjobs", help="KubeRay: start the file's RayJobs as well.")
    ] = False,
) -> None:
    """Bring a cluster up, once the file, credentials, keys and files to be copied are in order."""
    from xcloud.cloud.cluster_rules import fill_ins  # noqa: PLC0415 - see `_checked`
    from xcloud.cloud.launcher import credential_problems, file_problems, up_commands  # noqa: PLC0415 - see `_checked`

    cluster, problems, _ = _checked(file, jobs or (), prices, crds)
    _refuse(problems)
    started = cluster.only(lambda document: rayjobs or document.get("kind") != "RayJob")
    if not dry_run:
        _refuse([*fill_ins(started), *credential_problems(cluster, os.environ), *file_problems(cluster)])
    _run(started, up_commands(cluster, yes), dry_run)


@clusters.command()
def down(file: File, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Take a cluster down: all of its machines end."""
    from xcloud.cloud.cluster_file import read_cluster  # noqa: PLC0415 - see `_checked`
    from xcloud.cloud.launcher import (  # noqa: PLC0415 - see `_checked`
        credential_problems,
        down_commands,
        end_local,
        local_address,
    )

    cluster = read_cluster(file)
    if cluster.on_this_machine:
        address = local_address(cluster)
        if dry_run:
            typer.echo(f"end the Ray processes of {address}")
            return
        if not yes:
            typer.confirm(f"End the Ray processes of {address}?", abort=True)
        typer.echo(f"ended {end_local(cluster)} Ray processes of {address}")
        return
    if not dry_run:
        _refuse(credential_problems(cluster, os.environ))
        if cluster.form == "kuberay" and not yes:
            typer.confirm(f"Delete what {file} describes?", abort=True)
    _run(cluster, down_commands(cluster, yes), dry_run)


@clusters.command()
def status(file: File, dry_run: DryRun = False) -> None:
    """Show how a cluster stands: nodes, what they offer, what is pending."""
    from xcloud.cloud.cluster_file import read_cluster  # noqa: PLC0415 - see `_checked`
    from xcloud.cloud.launcher import credential_problems, status_commands  # noqa: PLC0415 - see `_checked`

    cluster = read_cluster(file)
    if not dry_run:
        _refuse(credential_problems(cluster, os.environ))
    _run(cluster, status_commands(cluster), dry_run)


Checked = tuple["ClusterFile", list["Problem"], list["Problem"]]


def _checked(file: Path, jobs: Sequence[Path], prices: Path | None, crds: Path | None) -> Checked:
    """The file, what is wrong with it, and what has to be looked at before `up`."""
    # Here, because it loads Ray, and `xcloud --help` should not wait for that.
    from xcloud.cloud.cluster_file import read_cluster  # noqa: PLC0415
    from xcloud.cloud.cluster_jobs import job_problems  # noqa: PLC0415
    from xcloud.cloud.cluster_rules import fill_ins, rule_problems  # noqa: PLC0415
    from xcloud.cloud.cluster_schema import (  # noqa: PLC0415
        CRDS_VARIABLE,
        kuberay_problems,
        launcher_problems,
        read_crds,
    )
    from xcloud.cloud.launcher import credential_problems  # noqa: PLC0415
    from xcloud.config import load_job  # noqa: PLC0415
    from xcloud.prices import load_prices  # noqa: PLC0415

    cluster = read_cluster(file)
    warnings = fill_ins(cluster)
    if cluster.form == "launcher":
        problems = list(launcher_problems(cluster))
    else:
        named = crds or (Path(os.environ[CRDS_VARIABLE]) if os.environ.get(CRDS_VARIABLE) else None)
        problems = [] if named is None else list(kuberay_problems(cluster, read_crds(named)))
        if named is None:
            warnings.append(
                cluster.error("", f"not checked against KubeRay's schema: give --crds DIR or {CRDS_VARIABLE}")
            )
    if not problems:  # the rules take the schema for granted
        problems += rule_problems(cluster, load_prices(prices))
    for job in jobs:
        regions = load_job(job).regions
        pools = [(f"regions.{r.name}.pools[{n}]", pool) for r in regions for n, pool in enumerate(r.pools)]
        problems += job_problems(cluster, str(job), pools)
    return cluster, problems, [*warnings, *credential_problems(cluster, os.environ)]


def _shipped() -> list[Path]:
    found = sorted(FOLDER.glob("*.yaml"))
    if not found:
        raise ConfigError(f"{FOLDER}/: no cluster files there; name one")
    return found


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise ConfigError("\n  ".join(["nothing was started:", *map(str, problems)]))


def _run(cluster: ClusterFile, commands: Sequence[Sequence[str]], dry_run: bool) -> None:
    """Run commands one after the other, on this terminal; a failing one's exit status becomes ours."""
    from xcloud.cloud.cluster_file import dump_cluster  # noqa: PLC0415 - see `_checked`

    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    }
    if cluster.on_this_machine:
        environment.setdefault("RAY_AUTH_MODE", "token")  # as the head that `ray start` makes asks for
    for command in commands:
        typer.echo(f"$ {shlex.join(command)}", err=not dry_run)
        if dry_run:
            continue
        try:
            # A list of words: no shell takes it apart.
            done = subprocess.run(  # nosec B603
                command,
                env=environment,
                input=dump_cluster(cluster) if command[-1] == "-" else None,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise PlacementError(f"{command[0]} is not on the PATH") from None
        if done.returncode != 0:
            raise typer.Exit(done.returncode)


def _record(cluster: ClusterFile, problems: Sequence[Problem], warnings: Sequence[Problem]) -> dict[str, Any]:
    return {
        "file": str(cluster.path),
        "form": cluster.form,
        "provider": cluster.provider,
        "valid": not problems,
        "problems": [{"file": p.file, "key": p.key, "text": p.text} for p in problems],
        "warnings": [{"file": p.file, "key": p.key, "text": p.text} for p in warnings],
        "node_types": [
            {
                "name": node.name,
                "cloud": node.cloud,
                "instance": node.instance,
                "market": node.market,
                "head": node.head,
                "min": node.least,
                "max": node.machines,
                "resources": {name: value for name, value in node.resources.items() if value < float("inf")},
                "labels": dict(node.labels),
            }
            for node in cluster.node_types
        ],
    }


def _show(
    cluster: ClusterFile, problems: Sequence[Problem], warnings: Sequence[Problem], jobs: Sequence[Path]
) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for title in ("  node type", "machine", "market", "up to", "CPUs", "accelerators", "region"):
        table.add_column(title)
    for node in cluster.node_types:
        table.add_row(*_row(node))
    console.print(f"{cluster.path} ({cluster.provider})", style="bold")
    console.print(table)
    for warning in warnings:
        console.print(f"look at: {warning}", style="yellow", soft_wrap=True, markup=False)
    for problem in problems:
        console.print(f"wrong: {problem}", style="red", soft_wrap=True, markup=False)
    if not problems:
        fits = f"; it has room for {', '.join(map(str, jobs))}" if jobs else ""
        console.print(f"OK {cluster.path}{fits}", style="green", soft_wrap=True, markup=False)
    console.print()


def _row(node: NodeType) -> list[str]:
    kind = node.labels.get("ray.io/accelerator-type", "GPU")
    return [
        f"  {node.name}" + (" (head)" if node.head and node.name != "head" else ""),
        node.instance or "-",
        node.market,
        str(node.machines),
        f"{node.cpus:g}",
        f"{node.gpus:g} x {kind}" if node.gpus else "-",
        node.labels.get("ray.io/region", "-"),
    ]
