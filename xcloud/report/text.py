"""Numbers and lines as people read them. Pure functions."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xcloud.cost.bill import Spent
from xcloud.metrics import Event, PrivacyRow, RoundRow

__all__ = [
    "CLEAR",
    "NOTICE_KINDS",
    "SIMULATION",
    "STOPPING",
    "closing_lines",
    "event_line",
    "exposed_line",
    "human_bytes",
    "human_clock",
    "human_count",
    "human_epsilon",
    "human_loss",
    "human_seconds",
    "human_usd",
    "round_line",
]

STOPPING = "stopping after this round; press Ctrl-C again to stop now (the last checkpoint stays)"
SIMULATION = "simulation: all regions share this cluster; nothing isolates them"
CLEAR = "in the clear: whoever sees the traffic reads every update (envelope: null)"


def exposed_line(address: str) -> str:
    """Warns of a cluster that was joined with `--insecure`."""
    return f"insecure: the Ray cluster at {address} has no TLS or no token; whoever reaches it reads and runs everything"


NOTICE_KINDS = {
    "hub_elsewhere",
    "region_failed",
    "region_leaving",
    "region_gone",
    "region_late",
    "region_refused",
    "region_rejoined",
    "round_rejected",
    "round_retried",
    "round_skipped",
}
"""Events that tell of a failure and what became of it, or of something that is not as the job says."""


def human_bytes(count: float) -> str:
    """`3.1 MB`: decimal units, as clouds bill them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        digits = 0 if unit == "B" or count >= 99.95 else 1
        if round(count, digits) < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.{digits}f} {unit}"


def human_count(count: float) -> str:
    """`950`, `5.8k`, `58k`, `1.2M`."""
    if not math.isfinite(count):
        return "-"
    for unit in ("", "k", "M", "G", "T"):
        digits = 0 if not unit or count >= 9.95 else 1
        if round(count, digits) < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:.{digits}f}{unit}"


def human_seconds(seconds: float) -> str:
    """`6.1 s`, `42 s`, `2 m 05 s`, `1 h 02 m`."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def human_clock(seconds: float) -> str:
    """`0:41`, `1:02:03`."""
    whole = max(0, int(seconds))
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole % 3600 // 60:0{2 if hours else 1}d}:{whole % 60:02d}"


def human_loss(loss: float | None) -> str:
    """`2.41`, below one `0.241`, and `-` for a loss that does not exist."""
    if loss is None or not math.isfinite(loss):
        return "-"
    return f"{loss:.{2 if abs(loss) >= 1 else 3}f}"


def human_epsilon(privacy: PrivacyRow | None) -> str:
    """`1.24`, and `-` where nothing is released under differential privacy. Say the unit beside it."""
    return "-" if privacy is None else f"{privacy.epsilon:.3g}"


def human_usd(usd: float | None, *, whole: bool = True) -> str:
    """`$1,235`, `$12.35`, `$0.0123`; `>= $12.35` where a price is missing, and `unknown` where all are."""
    if usd is None or not math.isfinite(usd) or (not whole and usd == 0):
        return "unknown"
    digits = 0 if usd >= 1000 else 2 if usd >= 1 or usd == 0 else min(8, 1 - math.floor(math.log10(usd)) + 1)
    return f"{'' if whole else '>= '}${usd:,.{digits}f}"


def round_line(row: RoundRow, rounds: int, width: int | None = None) -> str:
    """One committed round on one line, shortened from its end to fit `width`."""
    parts = [
        f"round {row.round}/{rounds}",
        f"train {human_loss(row.train_loss)}",
        f"eval {human_loss(row.eval_loss)}",
        *([f"epsilon {human_epsilon(row.privacy)} per {row.privacy.unit}"] if row.privacy else []),
        f"{human_count(row.tokens)} tokens",
        f"up {human_bytes(row.bytes_up)}",
        f"down {human_bytes(row.bytes_down)}",
        *([f"cost {human_usd(row.cost.usd, whole=not row.cost.unpriced)}"] if row.cost else []),
        f"compute {human_seconds(row.compute_s)}",
        f"sync {human_seconds(row.sync_s)}",
    ]
    return _fit(parts, "  ", width)


def event_line(event: Event, width: int | None = None) -> str | None:
    """An event worth a line of its own: a region that is ready, a failure, a retry."""
    get = event.fields.get
    region, number = get("region"), get("round")
    if event.kind == "region_starting":
        if get("attempt", 1) == 1:
            return f"{region}: loading torch, DeepSpeed"
        return f"{region}: restarting (start {get('attempt')})"
    if event.kind == "pool_fitted":
        return f"{region} pool {get('pool')}: {get('reason')}"
    if event.kind == "hub_elsewhere":
        return (
            f"egress is billed as if updates met in {get('hub')}, but the driver runs in {get('place')}, and they meet beside "
            "it: start it there, or set cost.hub to where it is"
        )
    if event.kind == "placement_waiting":
        return f"{region}: {get('missing') or 'there is room now; loading torch, DeepSpeed'}"
    if event.kind == "region_ready":
        return _ready_line(event.fields, width)
    if event.kind == "region_failed":
        reason = _first_line(get("reason")).removeprefix(f"region {region!r}: ")  # said already
        return f"{region} lost in round {number}: {reason}"
    if event.kind == "region_leaving":
        return f"{region} loses its machines: round {number} ends early there, with {human_count(get('tokens') or 0)} tokens"
    if event.kind == "region_gone":
        return f"{region} is gone for good after {get('restarts')} restarts"
    if event.kind == "region_late":
        return f"{region} missed the deadline of round {number}"
    if event.kind == "region_refused":
        return f"{region} is out of the merge of round {number}: {_first_line(get('reason'))}"
    if event.kind == "encryption":
        told = event.fields
        return (
            f"{region}: {human_bytes(told['plain_bytes'])} of fp32 are {human_bytes(told['sent_bytes'])} under CKKS, "
            f"encrypted at {told['encrypt_mb_per_s']:.1f} MB/s and decrypted at {told['decrypt_mb_per_s']:.1f} here: "
            f"{human_seconds(told['seconds'])} a round"
        )
    if event.kind == "secure_aggregation":
        how = "encrypted (CKKS)" if get("scheme") == "ckks" else "masked"
        line = f"{how}: sums of at least {get('minimum')} regions are opened, by at least {get('threshold')} of them"
        return f"{line}; keys made for this run in {get('made')}" if get("made") else line
    if event.kind == "privacy_started":
        ratio = float(event.fields.get("noise_to_signal_ratio", math.nan))
        noise = f"{get('mechanism')} noise on each merge, per {get('unit')}"
        return f"{noise}: {ratio:.3g} times as long as an update that all regions agree on"
    if event.kind == "region_rejoined":
        return f"{region} rejoined before round {number}"
    if event.kind == "round_retried":
        return f"round {number} tried again (attempt {get('attempt')}): {_first_line(get('reason'))}"
    if event.kind == "round_rejected":
        return f"round {number} taken back: {_first_line(get('reason'))}"
    if event.kind == "round_skipped":
        return f"round {number} skipped: {_first_line(get('reason'))}"
    return None


def _ready_line(fields: Mapping[str, Any], width: int | None) -> str:
    pools = []
    for pool in fields.get("pools") or ():
        devices = ", ".join(sorted({str(rank["device"]).partition(":")[0] for rank in pool}))
        pools.append(f"{len(pool)} x {devices}, {_held(pool)}")
    parts = [
        f"{fields.get('region')} ready in {human_seconds(fields.get('seconds') or 0.0)}: {'; '.join(pools)}"
    ]
    if fields.get("eval_loss") is not None:
        parts.append(f"eval {human_loss(fields['eval_loss'])}")
    if fields.get("privacy"):
        noise, unit = fields["privacy"]["noise_multiplier"], fields["privacy"]["unit"]
        parts.append(f"noise multiplier {noise:.3g} (unit: {unit})")
    parts.append(f"{human_count(fields.get('parameters') or 0)} parameters")
    return _fit(parts, "; ", width)


def _held(pool: Sequence[Mapping[str, Any]]) -> str:
    """What each rank of a pool holds; there is no optimizer state before the first step."""
    each = " each" if len(pool) > 1 else ""
    states = max(rank["optimizer_state_bytes"] for rank in pool)
    if states:
        return f"optimizer state {human_bytes(states)}{each}"
    return f"parameters {human_bytes(max(rank['parameter_bytes'] for rank in pool))}{each}"


def _fit(parts: list[str], separator: str, width: int | None) -> str:
    """The parts on one line, without its last ones where they do not fit."""
    parts = list(parts)
    while width is not None and len(parts) > 1 and len(separator.join(parts)) > width:
        parts.pop()
    return separator.join(parts)


def _first_line(reason: object) -> str:
    lines = str(reason or "").strip().splitlines()
    return lines[0] if lines else "no reason given"


def closing_lines(
    *,
    run_dir: Path,
    job_arguments: Sequence[str],
    rows: Sequence[RoundRow],
    rounds: int,
    finished: bool,
    reason: str,
    eval_loss_start: float | None,
    eval_loss_end: float | None,
    seconds: float,
    cost: Spent | None = None,
    budget_usd: float | None = None,
) -> list[str]:
    """What a run came to, where its results are and what to do next.

    Args:
        run_dir: the run folder, as the user may type it.
        job_arguments: the job file and its overrides, as the user typed them.
        rows: all committed rounds.
        rounds: rounds the job asks for.
        finished: whether all of them were played.
        reason: why not, otherwise.
        eval_loss_start: of the global model before training.
        eval_loss_end: after the last committed round.
        seconds: wall time of this start.
        cost: what the run has cost over all its starts; None: it is not billed.
        budget_usd: what it may cost.
    """
    last = rows[-1].round if rows else 0
    run = shlex.quote(str(run_dir))
    if finished:
        head = f"finished {rounds} rounds in {human_seconds(seconds)}"
    else:
        head = f"stopped after round {last}/{rounds} ({reason or 'stopped'}), {human_seconds(seconds)}"
    up, down = sum(row.bytes_up for row in rows), sum(row.bytes_down for row in rows)
    lines = [
        head,
        f"  eval loss   {_fall(eval_loss_start, eval_loss_end)}",
        f"  trained on  {human_count(sum(row.tokens for row in rows))} tokens",
        f"  network     {human_bytes(up)} up, {human_bytes(down)} down",
        f"  results     {run}",
        "next",
    ]
    spent = rows[-1].privacy if rows else None
    if spent is not None:
        lines.insert(
            3, f"  privacy     epsilon {human_epsilon(spent)} per {spent.unit} at delta {spent.delta:g}"
        )
    if cost is not None:
        lines.insert(lines.index("next") - 1, f"  cost        {_cost(cost)}")
    if not finished:
        more = ""
        if reason == "budget" and cost is not None and budget_usd is not None:
            lines.insert(
                1,
                f"  budget      {human_usd(budget_usd)} (cost.budget_usd) is not enough for another round, of about "
                f"{human_usd(cost.next_usd)}; raise it to go on",
            )
            more = " --set cost.budget_usd=MORE"
        lines.append(f"  xcloud train {shlex.join(job_arguments)}{more} --resume {run}")
    lines.append(f"  xcloud status {run}")
    if rows:
        lines += [
            f"  xcloud export {run} OUT",
            f"  tensorboard --logdir {shlex.quote(str(run_dir / 'tensorboard'))}",
        ]
    return lines


def _cost(spent: Spent) -> str:
    """Machines and egress of a run, and what has no price."""
    total = human_usd(spent.usd, whole=not spent.unpriced)
    parts = [f"machines {human_usd(spent.machines_usd)}", f"egress {human_usd(spent.egress_usd)}"]
    lacking = f"; no price: {', '.join(spent.unpriced)}" if spent.unpriced else ""
    return f"{total} ({', '.join(parts)}{lacking})"


def _fall(start: float | None, end: float | None) -> str:
    if start is None and end is None:
        return "not measured"
    text = f"{human_loss(start)} -> {human_loss(end)}"
    if start and end is not None and math.isfinite(start) and math.isfinite(end):
        text += f" ({100 * (end - start) / start:+.0f} %)"
    return text
