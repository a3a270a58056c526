"""What a job amounts to before it runs, and how a run stands, judged from its folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xcloud.cost.bill import Spent
from xcloud.metrics import RoundRow, read_events, read_rounds, run_state
from xcloud.report.text import (
    NOTICE_KINDS,
    SIMULATION,
    event_line,
    human_bytes,
    human_count,
    human_loss,
    human_seconds,
    human_usd,
    round_line,
)

if TYPE_CHECKING:  # the job file needs numpy and more, which `xcloud --help` should not wait for
    from xcloud.config import JobConfig

__all__ = ["job_record", "job_summary", "status_record", "status_view"]

NOTICES = 3
LAST_ROUNDS = 5


def job_record(job: JobConfig) -> dict[str, Any]:
    """What a job amounts to, as plain JSON types. Tokens are those of training."""
    steps_tokens = job.sequence_length * job.inner.steps
    regions = []
    for region in job.regions:
        pools = [
            {
                "accelerator": pool.accelerator,
                "workers": pool.workers,
                "zero_stage": pool.zero_stage,
                "precision": pool.precision,
                "sequences_per_step": pool.sequences_per_step,
            }
            for pool in region.pools
        ]
        tokens = region.sequences_per_step * steps_tokens
        regions.append(
            {"name": region.name, "cloud": region.cloud, "pools": pools, "tokens_per_round": tokens}
        )
    per_round = sum(region.sequences_per_step for region in job.regions) * steps_tokens
    return {
        "name": job.name,
        "model": job.model.pretrained or str((job.model.config or {})["model_type"]),
        "from_scratch": job.model.pretrained is None,
        "rounds": job.rounds,
        "inner_steps": job.inner.steps,
        "sequence_length": job.sequence_length,
        "regions": regions,
        "tokens_per_round": per_round,
        "tokens": per_round * job.rounds,
    }


def job_summary(job: JobConfig) -> RenderableType:
    """The same for people."""
    record = job_record(job)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in ("region", "cloud", "pools"):
        table.add_column(name)
    table.add_column("tokens/round", justify="right")
    for region in record["regions"]:
        pools = [
            f"{pool['workers']} x {pool['accelerator']}, ZeRO {pool['zero_stage']}, {pool['precision']}, "
            f"{pool['sequences_per_step']} seq/step"
            for pool in region["pools"]
        ]
        table.add_row(
            region["name"], region["cloud"], "\n".join(pools), human_count(region["tokens_per_round"])
        )
    origin = "from scratch" if record["from_scratch"] else "pretrained"
    return Group(
        Text.assemble((record["name"], "bold"), f"  {record['model']}, {origin}"),
        Text(
            f"{record['rounds']} rounds x {record['inner_steps']} inner steps, "
            f"{record['sequence_length']} tokens a sequence: "
            f"{human_count(record['tokens_per_round'])} tokens a round, {human_count(record['tokens'])} in all"
        ),
        Text(""),
        table,
    )


def status_record(run_dir: Path) -> dict[str, Any]:
    """How a run stands, from its folder, as plain JSON types. Tokens and bytes are totals.

    Raises:
        XCloudError: the folder holds no run, or its records are damaged.
    """
    state, events, rows = run_state(run_dir), read_events(run_dir), read_rounds(run_dir)
    pools = {event.fields["region"]: event.fields["pools"] for event in events if "pools" in event.fields}
    names = list(
        dict.fromkeys([*state.started.get("regions", ()), *(n for row in rows for n in row.regions)])
    )
    evals = [(row.round, row.eval_loss) for row in rows if row.eval_loss is not None]
    regions = {}
    for name in names:
        mine = [row.regions[name] for row in rows if name in row.regions]
        regions[name] = {
            "tokens": sum(row.tokens for row in mine),
            "bytes_up": sum(row.bytes_up for row in mine),
            "bytes_down": sum(row.bytes_down for row in mine),
            "tokens_per_s": mine[-1].tokens_per_s if mine else None,
            "train_loss": mine[-1].train_loss if mine else None,
            "eval_loss": next((row.eval_loss for row in reversed(mine) if row.eval_loss is not None), None),
            "pools": pools.get(name, []),
            "privacy": mine[-1].privacy.model_dump() if mine and mine[-1].privacy else None,
            "cost": _region_cost(rows, name),
        }
    spent = Spent.kept(run_dir)
    checkpoints = [event.fields for event in events if event.kind == "checkpoint_committed"]
    return {
        "run": str(run_dir),
        "job": state.started.get("job"),
        "state": state.state,
        "reason": state.reason,
        "round": state.round,
        "rounds": state.rounds,
        "last_event_age_s": state.age_s,
        "host": state.started.get("host"),
        "pid": state.started.get("pid"),
        "simulation": state.started.get("simulation"),
        "train_loss": rows[-1].train_loss if rows else None,
        "first_eval": evals[0] if evals else None,
        "last_eval": evals[-1] if evals else None,
        "tokens": sum(row.tokens for row in rows),
        "bytes_up": sum(row.bytes_up for row in rows),
        "bytes_down": sum(row.bytes_down for row in rows),
        "privacy": rows[-1].privacy.model_dump() if rows and rows[-1].privacy else None,
        "cost": None
        if spent is None
        else {"usd": spent.usd, **spent.model_dump(exclude={"format", "recent"})},
        "checkpoint": checkpoints[-1] if checkpoints else None,
        "regions": regions,
        "notices": [event_line(event) for event in events if event.kind in NOTICE_KINDS][-NOTICES:],
    }


def status_view(run_dir: Path) -> RenderableType:
    """The same for people.

    Raises:
        XCloudError: the folder holds no run, or its records are damaged.
    """
    record, rows = status_record(run_dir), read_rounds(run_dir)
    style = {"running": "green", "finished": "green", "failed": "bold red", "died": "bold red"}
    state = Text(record["state"], style=style.get(record["state"], "yellow"))
    parts: list[RenderableType] = [
        Text.assemble(
            (record["job"] or run_dir.name, "bold"),
            "  ",
            state,
            f"  round {record['round']}/{record['rounds']}",
        )
    ]
    facts = []
    if record["reason"]:
        facts.append(f"reason: {record['reason']}")
    if record["last_event_age_s"] is not None:
        where = f", process {record['pid']} on {record['host']}" if record["pid"] else ""
        facts.append(f"last event {human_seconds(record['last_event_age_s'])} ago{where}")
    if record["simulation"]:
        facts.append(SIMULATION)
    if record["first_eval"]:
        (first, start), (last, end) = record["first_eval"], record["last_eval"]
        facts.append(f"eval loss {human_loss(start)} (round {first}) -> {human_loss(end)} (round {last})")
    facts.append(
        f"{human_count(record['tokens'])} tokens, {human_bytes(record['bytes_up'])} up, "
        f"{human_bytes(record['bytes_down'])} down"
    )
    if record["privacy"]:
        spent = record["privacy"]
        facts.append(f"epsilon {spent['epsilon']:.3g} per {spent['unit']} at delta {spent['delta']:g}")
    if record["cost"]:
        spent = record["cost"]
        lacking = f"; no price: {', '.join(spent['unpriced'])}" if spent["unpriced"] else ""
        facts.append(
            f"cost {human_usd(spent['usd'], whole=not spent['unpriced'])}: machines {human_usd(spent['machines_usd'])}, "
            f"egress {human_usd(spent['egress_usd'])}{lacking}"
        )
        facts.append(
            f"{spent['accelerator_hours']:.3g} accelerator-hours, {spent['core_hours']:.3g} core-hours, "
            f"{spent['instance_hours']:.3g} instance-hours"
        )
    if record["checkpoint"]:
        facts.append(f"checkpoint of round {record['checkpoint']['round']}: {record['checkpoint']['path']}")
    parts += [Text(fact) for fact in facts]
    parts += [Text(""), _regions_table(record["regions"])]
    if rows:
        parts += [Text(""), *(Text(round_line(row, record["rounds"])) for row in rows[-LAST_ROUNDS:])]
    parts += [Text(f"! {notice}", style="red") for notice in record["notices"]]
    if record["state"] in ("stopped", "failed", "died"):
        job = run_dir / "job.yaml"
        words = ["xcloud", "train", str(job) if job.exists() else "JOB", "--resume", str(run_dir)]
        parts += [Text(""), Text(f"continue: {shlex.join(words)}")]
    return Group(*parts)


def _region_cost(rows: list[RoundRow], name: str) -> dict[str, Any] | None:
    """What a region has cost in all committed rounds; a sum with an unknown part is null."""
    parts = [row.cost.regions[name] for row in rows if row.cost is not None and name in row.cost.regions]
    if not parts:
        return None
    totals: dict[str, Any] = {}
    for key in parts[0].model_dump():
        values = [getattr(part, key) for part in parts]
        totals[key] = None if any(value is None for value in values) else sum(values)
    return totals


def _regions_table(regions: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("region", no_wrap=True, overflow="ellipsis")
    billed = any(region["cost"] for region in regions.values())
    columns = ("ranks", "optimizer/rank", "tok/s", "train", "eval", "tokens", "up", "down")
    for name in (*columns, *(("cost",) if billed else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for name, region in regions.items():
        ranks = [rank for pool in region["pools"] for rank in pool]
        state = max((rank["optimizer_state_bytes"] for rank in ranks), default=0)  # 0 before the first step
        table.add_row(
            name,
            str(len(ranks) or "-"),
            human_bytes(state) if state else "-",
            "-" if region["tokens_per_s"] is None else human_count(region["tokens_per_s"]),
            human_loss(region["train_loss"]),
            human_loss(region["eval_loss"]),
            human_count(region["tokens"]),
            human_bytes(region["bytes_up"]),
            human_bytes(region["bytes_down"]),
            *([_paid(region["cost"])] if billed else []),
        )
    return table


def _paid(cost: dict[str, Any] | None) -> str:
    if cost is None or cost["machines_usd"] is None or cost["egress_usd"] is None:
        return human_usd(None)
    return human_usd(cost["machines_usd"] + cost["egress_usd"])
