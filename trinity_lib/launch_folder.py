"""What starts a run on a cluster, written down: its configuration and the scripts beside it.

Nothing in the folder depends on where it lies, so that it can be written on one machine,
copied, and run on others. The scripts start torchrun, which starts `trinity_lib.train`.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from trinity_lib import disk
from trinity_lib.config import require, to_json
from trinity_lib.run import RunConfig

RESTARTS = 3
"""Times that torchrun begins all ranks again, from the last checkpoint, before it gives up."""
EMPTY = {"data": '"sources": []', "tokenizer": '"tokenizer": ""'}
"""What config.json says where a parameter was left out."""

TORCHRUN = """\
#!/usr/bin/env bash
# The run <name>: <ranks> processes on <where>.
# What is given to this script is handed on to trinity_lib.train (--resume, --runs DIR).
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"

refuse() {
    echo "torchrun.sh: $1" >&2
    exit 1
}
<checks>
there='from importlib.util import find_spec as f; exit(not (f("torch") and f("trinity_lib")))'
"$python" -c "$there" 2>/dev/null || refuse "$python cannot import torch and trinity_lib; \\
activate the project's environment, or give its python in PYTHON."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-<threads>}"
exec "$python" -m torch.distributed.run \\
    <machines> \\
    --nproc-per-node <per_node> --max-restarts <restarts> \\
    -m trinity_lib.train --config "$here/config.json"<resume> "$@"
"""
ONE = "--standalone --local-addr localhost"
SEVERAL = (
    '--nnodes <nodes> --rdzv-backend c10d --rdzv-id "${RUN_ID:-trinity}" \\\n'
    '    --rdzv-endpoint "$HEAD:${PORT:-29500}"'
)
NEEDS_HEAD = """
[ -n "${HEAD:-}" ] || refuse "HEAD is not set; give it the first machine's name, the same on \\
every machine, as in: HEAD=node001 bash torchrun.sh"
"""
SAYS = """
says() {
    grep -qF "$1" "$here/config.json"
}
"""
NEEDS = """
if says '"scale": "<scale>"' && says '<empty>'; then
    refuse "config.json has no <missing>, which scale <scale> needs; have this folder written \\
again with -p <missing> ..."
fi
"""

SLURM = """\
#!/usr/bin/env bash
# The run <name> under SLURM: <ranks> processes on <where>.
#     sbatch --partition=NAME --account=NAME --time=DAYS-HOURS slurm.sbatch
# A job that SLURM requeues goes on from the last checkpoint.
#SBATCH --job-name=<job>
#SBATCH --output=<job>-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=<nodes>
#SBATCH --ntasks-per-node=1
<gpus>#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
set -euo pipefail

# SLURM runs a copy of this script from a folder of its own: find the one that was submitted.
command='s/^ *Command=\\(.*slurm\\.sbatch\\).*/\\1/p'
script="$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n "$command")" || true
here=
for folder in "$(dirname -- "$script")" "${SLURM_SUBMIT_DIR:-.}" "$(dirname -- "$0")"; do
    if [ -z "$here" ] && [ -f "$folder/torchrun.sh" ]; then here="$folder"; fi
done
if [ -z "$here" ]; then
    echo "slurm.sbatch: torchrun.sh is not there; submit this script from its folder." >&2
    exit 1
fi
<head>
# One task a machine, with all its cores: torchrun starts the ranks there.
exec srun --kill-on-bad-exit=1 --cpu-bind=none bash "$here/torchrun.sh" "$@"
"""
HEAD = """
machines="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export HEAD="${machines%%$'\\n'*}" RUN_ID="$SLURM_JOB_ID"
"""

README = """\
# How to start <name>

<ranks> processes on <where>.

`config.json` is the whole configuration; the scripts beside it find it wherever this folder
lies, and need the project's environment: activated, or its python in PYTHON. What follows a
script's name goes to `trinity_lib.train`: `--resume`, `--runs DIR`.
<missing>
With torchrun, <each>:

    <torchrun>

With SLURM, from this folder, which every machine must see:

    sbatch --partition=NAME --account=NAME --time=DAYS-HOURS slurm.sbatch

A rank that dies ends all; torchrun begins them again from the last checkpoint, <restarts> times
at most. A job that is requeued goes on from there too; one that ran out of time does with
`slurm.sbatch --resume`.
"""


class Commands(NamedTuple):
    """What starts the run, to be typed as it is."""

    torchrun: str
    """On this machine, or on each of several."""
    slurm: str
    """On a SLURM cluster."""


def write(
    folder: Path,
    config: RunConfig,
    *,
    ranks: int,
    per_node: int,
    name: str,
    resume: bool = False,
    missing: Sequence[str] = (),
) -> Commands:
    """Write a launch folder for `ranks` processes, `per_node` a machine; what starts the run.

    The run will be called `name`, and begins anew unless `resume`. `missing` are the
    parameters ("data", "tokenizer") that the scale needs and `config` lacks: the scripts
    refuse until config.json has them. A folder of that name is replaced, whole. Raises
    BadValue where the ranks do not fill their machines.
    """
    require(ranks >= 1, "ranks", ranks, "at least 1")
    require(per_node >= 1, "per_node", per_node, "at least 1")
    per_node = min(ranks, per_node)
    require(ranks % per_node == 0, "ranks", ranks, f"a multiple of per_node ({per_node})")
    for parameter in missing:
        require(parameter in EMPTY, "missing", parameter, f"of {', '.join(EMPTY)}")
    config = replace(config, name=name)
    values = _values(config, ranks, per_node, resume, missing)
    files = {"torchrun.sh": TORCHRUN, "slurm.sbatch": SLURM, "README.md": README}
    filled = {file: _filled(text, values) for file, text in files.items()}
    filled["config.json"] = json.dumps(json.loads(to_json(config)), indent=2) + "\n"

    def fill(temporary: Path) -> None:
        for file, text in filled.items():
            (temporary / file).write_text(text)
        (temporary / "torchrun.sh").chmod(0o755)

    disk.replace_folder(folder, fill)
    head = "HEAD=FIRST_MACHINE " if ranks > per_node else ""
    return Commands(
        f"{head}bash {shlex.quote(str(folder / 'torchrun.sh'))}",
        f"sbatch --partition=NAME --account=NAME --time=DAYS-HOURS "
        f"{shlex.quote(str(folder / 'slurm.sbatch'))}",
    )


def _values(
    config: RunConfig, ranks: int, per_node: int, resume: bool, missing: Sequence[str]
) -> dict[str, str]:
    """What stands for each <word> of the texts; words in what is filled in are filled too."""
    nodes = ranks // per_node
    several = nodes > 1
    needs = [
        NEEDS.replace("<missing>", each).replace("<empty>", EMPTY[each]) for each in missing
    ]
    lacks = f"\n**It lacks {' and '.join(missing)}**: scale {config.scale} needs them.\n"
    return {
        "checks": "".join([SAYS if needs else "", *needs, NEEDS_HEAD if several else ""]),
        "machines": SEVERAL if several else ONE,
        "head": HEAD if several else "",
        "gpus": f"#SBATCH --gpus-per-node={per_node}\n" if config.device == "cuda" else "",
        "resume": " --resume" if resume else "",
        "missing": lacks if missing else "",
        "each": "the same line on every machine" if several else "on that machine",
        "torchrun": f"{'HEAD=FIRST_MACHINE ' if several else ''}bash torchrun.sh",
        "where": f"{nodes} machines, {per_node} on each" if several else "one machine",
        "nodes": str(nodes),
        "per_node": str(per_node),
        "ranks": str(ranks),
        "restarts": str(RESTARTS),
        "threads": str(config.threads),
        "scale": config.scale,
        "name": config.name,
        "job": re.sub(r"[^\w.-]", "-", config.name),
    }


def _filled(text: str, values: Mapping[str, str]) -> str:
    for word, value in values.items():
        text = text.replace(f"<{word}>", value)
    return text
