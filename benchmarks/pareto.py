"""Loss against bytes: which recipes come close to synchronous data-parallel training, and on how few bytes?

Three regions with three kinds of text, and a common warm start. The data-parallel run is a bare DeepSpeed loop over
the union of what the regions read in a step (`benchmarks.data_parallel`); the recipes are real jobs. All train the same
number of steps on the same tokens, from fresh inner optimizers, and are judged on the same held-out sequences of
all three kinds. `loss_gap` is (loss - data-parallel loss) / data-parallel loss, with AdamW in the data-parallel run
whatever the recipe has. Bytes are those that the rounds report, of all regions; `bytes_ratio` is bf16 gradients, 2 bytes a
parameter up and 2 down at every step and region, over them.

Every run is kept under `runs/pareto` by a digest of its job and of the code, so that an interrupted benchmark goes on
where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray
import yaml
from safetensors import safe_open

from benchmarks.harness import Options, Result
from benchmarks.scatter import Goal, Point, scatter
from xcloud.codecs import CODECS
from xcloud.config import JobConfig, dump_job, parse_job
from xcloud.export import export_run
from xcloud.launch import train
from xcloud.metrics import RunLog, read_rounds
from xcloud.quiet import apply_quiet, quiet_environment
from xcloud.update import adds_up

__all__ = ["RECIPES", "Played", "Recipe", "best_gap", "gaps_of", "job_of", "plot", "row", "run"]

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "pareto"
PLOT = Path(__file__).parent / "results" / "pareto.svg"

MODEL = """
model_type: llama
hidden_size: 64
intermediate_size: 176
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 4
max_position_embeddings: 128
tie_word_embeddings: true
"""
SETUP = """
name: pareto
sequence_length: 128
chunk_size: 65536
checkpoint: {every: 0, keep: 1}
inner:
  optimizer: {type: adamw, lr: 4e-3}
  schedule: {type: cosine, warmup_steps: 20, final_ratio: 0.02}
"""
WARM_START = """
inner:
  steps: {steps}
  optimizer: {{type: adamw, lr: 8e-3}}
  schedule: {{type: constant, warmup_steps: 40}}
outer: {{type: sgd, lr: 1.0}}
"""
MUON = "{type: muon, lr: 2e-3}"
KINDS = {"us-east-1": "modules", "europe-west4": "tests", "westeurope": "reference"}
WARM_STEPS, WARM_BATCH = 2000, 12
STEPS, MICRO_BATCH = 4160, 2


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        name: of its row.
        text: the keys of a job that make it up, in YAML; they go over `SETUP`.
        seeds: it runs with; three where a target hangs on it.
    """

    name: str
    text: str
    seeds: int = 1

    @property
    def linear(self) -> bool:
        """Whether its encodings add, so that it also runs under masks."""
        return adds_up(CODECS.parse(yaml.safe_load(self.text).get("codec", "identity")).build())

    @property
    def steps(self) -> int:
        """Inner steps of a round (H)."""
        return int(yaml.safe_load(self.text)["inner"]["steps"])

    @property
    def inner(self) -> str:
        """The inner optimizer's type."""
        return str(yaml.safe_load(self.text)["inner"].get("optimizer", {"type": "adamw"})["type"])


@dataclass(frozen=True)
class Played:
    """One run: its last held-out loss, and the bytes of all its regions and rounds."""

    loss: float
    bytes_up: int
    bytes_down: int
    seconds: float


Trainer = Callable[[JobConfig, Path], Played]

DATA_PARALLEL = Recipe("data-parallel", "inner: {steps: 1}", 3)
MUON_DATA_PARALLEL = Recipe("data-parallel, Muon", f"inner: {{steps: 1, optimizer: {MUON}}}")
NESTEROV = "{type: nesterov, lr: 0.9, momentum: 0.7}"
TWO_BITS = "{type: fixed, bits: 2, rounding: nearest}"
TERNARY = "outer: {type: nesterov, lr: 0.9, momentum: 0.6}\ncodec: ternary\ndownlink: ternary"


def recipe(name: str, steps: int, changes: str = "", muon: bool = False, seeds: int = 1) -> Recipe:
    """A recipe of H = `steps` with DiLoCo's outer optimizer, unless `changes` (keys of a job) has another."""
    inner = f"inner: {{steps: {steps}, optimizer: {MUON}}}" if muon else f"inner: {{steps: {steps}}}"
    outer = "" if "outer:" in changes else f"outer: {NESTEROV}\n"
    return Recipe(name, f"{inner}\n{outer}{changes}", seeds)


RECIPES = [
    recipe("muon, 2-bit sum, H = 80", 80, f"codec: {TWO_BITS}", muon=True, seeds=3),
    recipe("muon, ternary both ways, H = 208", 208, TERNARY, muon=True, seeds=3),
    recipe("fedavg", 32, "outer: {type: sgd, lr: 1.0}"),
    recipe("diloco", 32),
    recipe("diloco, e3m0", 32, "codec: e3m0\ndownlink: {type: block, bits: 4}"),
    recipe("diloco, 4-bit sum", 40, "codec: {type: fixed, bits: 4}"),
    recipe(
        "sparseloco",
        40,
        "aggregator: norm_bound\nouter: {type: sgd, lr: 1.0}\n"
        "codec: {type: topk, k: 64, feedback: 0.95}\ndownlink: {type: sparse, bits: 2}",
    ),
    recipe("diloco, bf16", 32, "codec: bf16\ndownlink: bf16"),
    recipe("diloco, 2-bit sum", 80, f"codec: {TWO_BITS}"),
    recipe("fedavg, lowrank sum", 32, "outer: {type: sgd, lr: 1.0}\ncodec: lowrank"),
    recipe("fedavg, random_k 4-bit sum", 32, "outer: {type: sgd, lr: 1.0}\ncodec: {type: random_k, bits: 4}"),
]
QUICK = ("diloco", "diloco, 4-bit sum", "sparseloco")
SUMMARY = ("recipe", "loss_gap", "bytes_ratio", "linear")
GOALS = {  # metric: fewest times fewer bytes, largest gap, only recipes whose encodings add
    "gap_at_100x": (100.0, 0.01, False),
    "gap_at_400x_linear": (400.0, 0.01, True),
    "gap_at_2000x": (2000.0, 0.02, False),
}


def run(options: Options) -> Result:
    """A warm start, the data-parallel runs, then every recipe."""
    apply_quiet()
    warm_steps, steps, sequences = (60, 120, 48) if options.quick else (WARM_STEPS, STEPS, 192)
    recipes = [recipe for recipe in RECIPES if recipe.name in QUICK or not options.quick]
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    ray.init(
        address="local",
        num_cpus=len(KINDS) + 1,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        namespace="xcloud",
    )
    try:
        model = warm_start(options.seed + 1000, warm_steps, sequences)  # no run's order of data

        def play(recipe: Recipe, trainer: Trainer, together: int) -> list[Played]:
            jobs = [job_of(recipe.text, seed, steps, model, sequences) for seed in seeds[: recipe.seeds]]
            with ThreadPoolExecutor(together) as pool:
                return list(pool.map(lambda job: kept(recipe.name, job, trainer), jobs))

        baselines = {  # a data-parallel run is one process and thread, a job three
            recipe.inner: play(recipe, play_data_parallel, len(seeds))
            for recipe in (DATA_PARALLEL, MUON_DATA_PARALLEL)
        }
        played = [play(recipe, play_job, 1) for recipe in recipes]
    finally:
        ray.shutdown()
    exchanged = 4 * parameters_of(model) * len(KINDS) * steps
    rows = [
        row(recipe, runs, baselines, exchanged)
        for recipe, runs in zip(
            (DATA_PARALLEL, MUON_DATA_PARALLEL, *recipes), (*baselines.values(), *played), strict=True
        )
    ]
    if not options.quick:
        PLOT.write_text(plot(rows), encoding="utf-8")
    compressed = rows[2:]
    best = min(compressed, key=lambda row: row["loss_gap"])
    return Result(
        metrics={
            **{
                name: best_gap(compressed, ratio, linear, len(seeds))
                for name, (ratio, _, linear) in GOALS.items()
            },
            "best_recipe": best["recipe"],
            "best_gap": best["loss_gap"],
            "muon_data_parallel_gap": rows[1]["loss_gap"],
            "data_parallel_loss": rows[0]["loss"],
            "rows": [{key: row[key] for key in SUMMARY} for row in rows],
        },
        targets={name: f"<= {gap:g}" for name, (_, gap, _) in GOALS.items()},
        rows=rows,
        notes=[
            f"{parameters_of(model):,} parameters, {steps} steps of {MICRO_BATCH} x 128 tokens a region",
            f"warm start: {warm_steps} steps of {WARM_BATCH} x 128 tokens of all three kinds; {sequences} held-out sequences of three kinds",
            "loss_gap: mean over seeds of loss / data-parallel AdamW loss - 1; spread: its largest less its smallest",
            "gap_same_inner: the same against the data-parallel run with the recipe's own inner optimizer",
        ],
    )


# ------------------------------------------------------------------------------- runs


def job_of(text: str, seed: int, steps: int, model: Mapping[str, Any], sequences: int) -> JobConfig:
    """The job of three regions that a recipe's keys make, for `steps` steps in all."""
    raw, own = yaml.safe_load(SETUP), yaml.safe_load(text)
    inner = {**raw["inner"], **own.pop("inner")}
    rounds, rest = divmod(steps, inner["steps"])
    if rest:
        raise ValueError(f"{steps} steps are no whole number of rounds of {inner['steps']}")
    sources = [{"type": "stdlib", "kind": kind} for kind in KINDS.values()]
    regions = [
        {
            "name": name,
            "cloud": name,
            "data": {"type": "stdlib", "kind": kind},
            "evaluate_on": sources,
            "pools": [{"zero_stage": 0, "micro_batch": MICRO_BATCH}],
        }
        for name, kind in KINDS.items()
    ]
    raw["evaluation"] = {"sequences": sequences, "every": rounds}
    return parse_job(
        yaml.safe_dump(
            {
                **raw,
                **own,
                "inner": inner,
                "rounds": rounds,
                "seed": seed,
                "model": dict(model),
                "regions": regions,
            }
        )
    )


def warm_start(seed: int, steps: int, sequences: int) -> dict[str, Any]:
    """The model that all runs start from: a job of one region that reads all three kinds, exported."""
    job = job_of(WARM_START.format(steps=steps), seed, steps, {"config": yaml.safe_load(MODEL)}, sequences)
    region = job.regions[0]
    pool = region.pools[0].model_copy(update={"micro_batch": WARM_BATCH})
    everywhere = region.model_copy(update={"data": region.evaluate_on, "pools": (pool,)})
    job = job.model_copy(update={"regions": (everywhere,)})
    kept("warm start", job, play_job)
    folder = RUNS / digest_of(job, play_job)
    if not (folder / "exported").exists():
        shutil.rmtree(folder / "exporting", ignore_errors=True)
        export_run(folder / "run", folder / "exporting")
        (folder / "exporting").rename(folder / "exported")
    return {"pretrained": str(folder / "exported")}


def kept(name: str, job: JobConfig, trainer: Trainer) -> Played:
    """A run from its folder, or played now."""
    folder = RUNS / digest_of(job, trainer)
    result = folder / "result.json"
    if not result.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.perf_counter()
        played = trainer(job, folder / "run")
        result.write_text(json.dumps(asdict(played)), encoding="utf-8")
        say(f"{name}, seed {job.seed}: loss {played.loss:.4f} in {time.perf_counter() - began:.0f} s")
    return Played(**json.loads(result.read_text(encoding="utf-8")))


def digest_of(job: JobConfig, trainer: Trainer) -> str:
    """Of the job, of who trains it and of all code that could change what comes out."""
    found = hashlib.blake2b(code_digest() + trainer.__name__.encode() + dump_job(job).encode(), digest_size=8)
    return found.hexdigest()


@cache
def code_digest() -> bytes:
    """Of the package and of the data-parallel run."""
    found = hashlib.blake2b(digest_size=16)
    for path in [*sorted((ROOT / "xcloud").rglob("*.py")), Path(__file__).with_name("data_parallel.py")]:
        found.update(path.read_bytes())
    return found.digest()


def play_job(job: JobConfig, folder: Path) -> Played:
    """A real run of the job."""
    began = time.perf_counter()
    with RunLog(folder) as log:
        outcome = train(job, run_dir=folder, log=log)
    rounds = read_rounds(folder)
    regions = [region for played in rounds for region in played.regions.values()]
    return Played(
        loss=math.nan if outcome.eval_loss_end is None else outcome.eval_loss_end,
        bytes_up=sum(region.bytes_up for region in regions),
        bytes_down=sum(region.bytes_down for region in regions),
        seconds=time.perf_counter() - began,
    )


def play_data_parallel(job: JobConfig, folder: Path) -> Played:
    """The same steps of a synchronous run, in a process of its own."""
    del folder
    began = time.perf_counter()
    environment = quiet_environment() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    options = {"num_cpus": 1, "runtime_env": {"env_vars": environment}}
    actor = ray.remote(DataParallel).options(**options).remote()
    loss = ray.get(actor.train.remote(dump_job(job)))
    ray.kill(actor)
    return Played(loss, 0, 0, time.perf_counter() - began)


class DataParallel:
    """The actor of a data-parallel run."""

    def train(self, job: str) -> float:
        """The last held-out loss."""
        from benchmarks.data_parallel import data_parallel  # noqa: PLC0415 - torch and DeepSpeed are for this actor

        return data_parallel(parse_job(job))


def parameters_of(model: Mapping[str, Any]) -> int:
    """Values in an exported model."""
    with safe_open(Path(model["pretrained"]) / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


# ---------------------------------------------------------------------------- figures


def row(
    recipe: Recipe, runs: Sequence[Played], baselines: Mapping[str, Sequence[Played]], exchanged: int
) -> dict[str, Any]:
    """A recipe's line of the table; gaps are means over its seeds, each against the same seed's data-parallel run.

    Args:
        baselines: data-parallel runs by inner optimizer.
        exchanged: bytes that bf16 gradients would have taken, of all regions both ways.
    """
    gaps, same = gaps_of(runs, baselines["adamw"]), baselines.get(recipe.inner)
    up, down = (statistics.mean(way) for way in zip(*((p.bytes_up, p.bytes_down) for p in runs), strict=True))
    return {
        "recipe": recipe.name,
        "inner": recipe.inner,
        "steps": recipe.steps,
        "loss": statistics.mean(played.loss for played in runs),
        "loss_gap": statistics.mean(gaps),
        "spread": max(gaps) - min(gaps) if len(gaps) > 1 else None,
        "gap_same_inner": statistics.mean(gaps_of(runs, same)) if same else None,
        "bytes_up": round(up) or None,
        "bytes_down": round(down) or None,
        "bytes_ratio": exchanged / (up + down) if up + down else 1.0,
        "linear": recipe.linear,
        "seeds": len(runs),
    }


def gaps_of(runs: Sequence[Played], baseline: Sequence[Played]) -> list[float]:
    """(loss - baseline loss) / baseline loss, seed by seed; a recipe may have fewer seeds than the baseline."""
    return [played.loss / bare.loss - 1 for played, bare in zip(runs, baseline, strict=False)]


def best_gap(rows: Sequence[Mapping[str, Any]], ratio: float, linear: bool, seeds: int) -> float | None:
    """The smallest gap of the recipes that save so many bytes; None: there is none.

    Args:
        linear: only recipes whose encodings add.
        seeds: only recipes that ran with so many.
    """
    fit = [
        row["loss_gap"]
        for row in rows
        if row["bytes_ratio"] >= ratio and (row["linear"] or not linear) and row["seeds"] >= seeds
    ]
    return min(fit, default=None)


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as a picture."""
    kinds = (("AdamW inside", "#2563a8"), ("Muon inside", "#b4541a"))
    points = [
        Point(
            x=row["bytes_ratio"],
            y=100 * row["loss_gap"],
            label=row["recipe"],
            kind=kinds[row["inner"] == "muon"][0],
            filled=row["linear"],
            spread=100 * (row["spread"] or 0.0),
        )
        for row in rows
    ]
    goals = [
        Goal(ratio, 100 * gap, f"<= {100 * gap:g} % at >= {ratio:,.0f}x{', linear' if linear else ''}")
        for ratio, gap, linear in GOALS.values()
    ]
    return scatter(
        "Held-out loss against bytes, three regions with three kinds of text",
        "times fewer bytes than bf16 gradients at every step",
        "loss gap to synchronous data-parallel AdamW, %",
        points,
        goals,
        kinds,
        ("encodings add (linear)", "opened by the aggregator"),
    )


def say(line: str) -> None:
    """Progress, beside the table that goes to standard output."""
    print(line, file=sys.stderr, flush=True)
