"""The README's figure: 256 experts, top-4, 300 steps, without a balancer and with SMEBU.

    python benchmarks/figure.py

Trains the two runs where `runs/figure-*.nc` do not exist (about a minute each on one
core) and draws `runs/reference/collapse.png` from the run files.
"""

from trinity_lib import launch, plots
from trinity_lib.record import open_run
from trinity_lib.train import RUNS, train


def main() -> None:
    runs = {}
    for method, label in (("none", "no balancer"), ("smebu", "SMEBU")):
        name = f"figure-{method}"
        if not (RUNS / f"{name}.nc").exists():
            train(launch.configure(num_experts=256, steps=300, balance=method, name=name))
        runs[label] = open_run(RUNS / f"{name}.nc")
    path = RUNS / "reference" / "collapse.png"
    plots.collapse(runs).savefig(path, dpi=100)
    print(path)


if __name__ == "__main__":
    main()
