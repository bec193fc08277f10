"""What is said of a collapse study, and the statistic that decides each of it. No torch.

A statement was written down before the runs that judge it, with its statistic: one number a
seed, positive where the statement holds. Its mean over seeds has a 95% t-interval, and the
verdict follows from that interval alone. (`LOG.md` says which were added while runs were on.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from trinity_lib import findings


class Statement(NamedTuple):
    """One statement and the statistic that decides it."""

    text: str
    """What is said."""
    statistic: str
    """What is measured, positive where it holds."""
    measure: Callable[[pd.DataFrame], pd.Series]
    """Table -> one number a seed."""


def finals(rows: pd.DataFrame, method: str, column: str) -> pd.Series:
    """A balancer at its best step size, by seed: of the finals, or else the grid's own seed."""
    chosen = rows[(rows["part"] == "finals") & (rows["method"] == method)]
    if chosen.empty:
        tried = rows[(rows["part"] == "grid") & (rows["seed"] == 0)]
        best = findings.best_of(tried).get(method)
        chosen = tried[(tried["method"] == method) & (tried["rate"] == best)]
    return _by_seed(chosen, column)


def _by_seed(rows: pd.DataFrame, column: str) -> pd.Series:
    return rows.drop_duplicates("seed").set_index("seed")[column]


def _level(
    rows: pd.DataFrame, part: str, axis: str, level: str | int, column: str, method: str = ""
) -> pd.Series:
    """One level of an axis by seed; 0 is its lowest level, -1 its highest."""
    chosen = rows[(rows["part"] == part) & (rows["axis"] == axis)]
    if method:
        chosen = chosen[chosen["method"] == method]
    if isinstance(level, int):
        levels = sorted(set(chosen["level"]), key=lambda text: float(text.split()[0]))
        if not levels:
            return pd.Series(dtype=float)
        level = levels[level]
    return _by_seed(chosen[chosen["level"] == level], column)


def _gap(
    part: str, axis: str, high: str | int, low: str | int, column: str
) -> Callable[[pd.DataFrame], pd.Series]:
    """`column` at one level of an axis less at another, by seed."""

    def measure(rows: pd.DataFrame) -> pd.Series:
        return _level(rows, part, axis, high, column) - _level(rows, part, axis, low, column)

    return measure


def _worse(high: str, low: str, column: str, factor: float = 1.0) -> Callable:
    """`factor` times `column` of one balancer at its best, less another's, by seed."""

    def measure(rows: pd.DataFrame) -> pd.Series:
        return factor * finals(rows, high, column) - finals(rows, low, column)

    return measure


def _curve(rows: pd.DataFrame, method: str, column: str) -> pd.DataFrame:
    """A balancer over the grid: a row a seed, a column a step size."""
    tried = rows[(rows["part"] == "grid") & (rows["method"] == method)]
    return tried.pivot_table(index="seed", columns="rate", values=column, dropna=False)


def _around_best(rows: pd.DataFrame, method: str, column: str, steps: Sequence[int]) -> Any:
    """The mean of `column` over step sizes that many grid steps from the balancer's own best.

    By seed; the first seed chose the best, and is left out where there are others. NaN where
    the grid ends or a run diverged.
    """
    curve = _curve(rows, method, column)
    best = findings.best_of(rows[(rows["part"] == "grid") & (rows["seed"] == 0)]).get(method)
    if best is None or best not in curve.columns:
        return pd.Series(dtype=float)
    at = int(np.flatnonzero(curve.columns == best)[0])
    judged = curve.drop(0, errors="ignore") if len(curve) > 1 else curve
    inside = [judged.iloc[:, at + s] for s in steps if 0 <= at + s < curve.shape[1]]
    if not inside:
        return pd.Series(dtype=float)
    return pd.concat(inside, axis=1).mean(axis=1, skipna=False)


def _own(column: str, steps: Sequence[int]) -> Callable[[pd.DataFrame], pd.Series]:
    """Sign less SMEBU, each that many grid steps from its own best step size."""

    def measure(rows: pd.DataFrame) -> pd.Series:
        sign, smebu = (_around_best(rows, m, column, steps) for m in ("sign", "smebu"))
        return sign - smebu

    return measure


def _u_shape(rows: pd.DataFrame) -> pd.Series:
    """The better end of the grid less the best inner step size, which other seeds choose."""
    curve = _curve(rows, "loss_free", "excess")
    if curve.shape[1] < 3:
        return pd.Series(dtype=float)
    ends, inner = curve.iloc[:, [0, -1]].min(axis=1), curve.iloc[:, 1:-1]
    found = {}
    for seed in curve.index:
        others = (inner.drop(seed) if len(inner) > 1 else inner).mean().dropna()
        best = inner.loc[seed, others.idxmin()] if len(others) else np.nan
        found[seed] = ends[seed] - best
    return pd.Series(found, dtype=float)


def _robust(column: str) -> Callable[[pd.DataFrame], pd.Series]:
    def measure(rows: pd.DataFrame) -> pd.Series:
        sign, smebu = (_curve(rows, m, column) for m in ("sign", "smebu"))
        return (sign - smebu).mean(axis=1, skipna=False)

    return measure


def _driven(rows: pd.DataFrame) -> pd.Series:
    sign, smebu = (_curve(rows, m, "dead") for m in ("sign", "smebu"))
    return (sign - smebu).iloc[:, -1] if sign.shape[1] else pd.Series(dtype=float)


def _batch_gap(rows: pd.DataFrame) -> pd.Series:
    def lead(level: int) -> pd.Series:
        sign, smebu = (
            _level(rows, "anatomy", "rows a batch", level, "excess", m)
            for m in ("sign", "smebu")
        )
        return sign - smebu

    return lead(-1) - lead(0)


_DEAD, _VIO, _LOSS = "share of dead experts", "excess MaxVio", "validation loss, nat/token"

CLAIMS = (
    Statement(
        "Without a balancer experts die that SMEBU keeps alive.",
        f"{_DEAD}: none less smebu",
        _worse("none", "smebu", "dead"),
    ),
    Statement(
        "Collapse costs validation loss.",
        f"{_LOSS}: none less smebu",
        _worse("none", "smebu", "loss"),
    ),
    Statement(
        "Sparsity drives collapse.",
        f"{_DEAD} without a balancer: most experts less fewest, equal top-k",
        _gap("causes", "experts", -1, 0, "dead"),
    ),
    Statement(
        "A higher learning rate deepens collapse.",
        f"{_DEAD} without a balancer: 3 x less 0.3 x the rate",
        _gap("causes", "learning rate", -1, 0, "dead"),
    ),
    Statement(
        "A small batch deepens collapse.",
        f"{_DEAD} without a balancer, equal steps: a quarter of the rows less four times",
        _gap("causes", "rows a batch", 0, -1, "dead"),
    ),
    Statement(
        "RSDB eases collapse.",
        f"{_DEAD} without a balancer: packed in order less RSDB",
        _gap("causes", "order", "packed in order", "RSDB", "dead"),
    ),
    Statement(
        "Muon keeps more experts alive than AdamW.",
        f"{_DEAD} without a balancer: AdamW less Muon",
        _gap("causes", "optimiser", "AdamW", "Muon, idle experts rest", "dead"),
    ),
    Statement(
        "Under Muon, experts that rest while idle die less.",
        f"{_DEAD} without a balancer: idle experts move less rest",
        _gap(
            "causes", "optimiser", "Muon, idle experts move", "Muon, idle experts rest", "dead"
        ),
    ),
    Statement(
        "Leading dense layers ease the first MoE layer.",
        "MaxVio of the first MoE layer without a balancer: no dense layer less two",
        _gap("causes", "leading dense layers", 0, -1, "first_max_vio"),
    ),
    Statement(
        "The uncentred sign update has a best step size (Wang et al. 2024, figure 4: a U).",
        f"{_VIO} of loss_free: the better end of the grid less the best inner step size",
        _u_shape,
    ),
    Statement(
        "Loss-free beats the auxiliary loss in loss (Wang et al. 2024, table 2).",
        f"{_LOSS}, each at its best: switch less loss_free",
        _worse("switch", "loss_free", "loss"),
    ),
    Statement(
        "Loss-free beats the auxiliary loss in balance (Wang et al. 2024, table 2).",
        f"{_VIO}, each at its best: switch less loss_free",
        _worse("switch", "loss_free", "excess"),
    ),
    Statement(
        "At equal step sizes, over the whole grid, SMEBU is better balanced than sign.",
        f"{_VIO}, mean over the grid, same numbers for both: sign less smebu",
        _robust("excess"),
    ),
    Statement(
        "At equal step sizes, over the whole grid, SMEBU has the lower loss.",
        f"{_LOSS}, mean over the grid, same numbers for both: sign less smebu",
        _robust("loss"),
    ),
    Statement(
        "At the largest step size sign kills more experts than SMEBU.",
        f"{_DEAD} at the same number for both: sign less smebu",
        _driven,
    ),
    Statement(
        "Over a decade around each one's own best, SMEBU is better balanced than sign.",
        f"{_VIO}, mean of the best step size and its neighbours: sign less smebu",
        _own("excess", (-1, 0, 1)),
    ),
    Statement(
        "At ten times each one's own best, SMEBU is better balanced than sign.",
        f"{_VIO} two grid steps above the best: sign less smebu",
        _own("excess", (2,)),
    ),
    Statement(
        "At its best SMEBU is better balanced than sign at its own.",
        f"{_VIO}: sign less smebu",
        _worse("sign", "smebu", "excess"),
    ),
    Statement(
        "At its best SMEBU has a lower loss than sign at its own.",
        f"{_LOSS}: sign less smebu",
        _worse("sign", "smebu", "loss"),
    ),
    Statement(
        "Quantile balancing, untuned, is as balanced as tuned SMEBU, within a tenth.",
        f"{_VIO}: 1.1 times smebu less quantile",
        _worse("smebu", "quantile", "excess", 1.1),
    ),
    Statement(
        "Quantile balancing, untuned, has a lower loss than tuned SMEBU.",
        f"{_LOSS}: smebu less quantile",
        _worse("smebu", "quantile", "loss"),
    ),
    Statement(
        "A learned router has a lower loss than one fixed by a hash of the token.",
        f"{_LOSS}: hash less smebu",
        _worse("hash", "smebu", "loss"),
    ),
    Statement(
        "Expert choice reads later tokens.",
        "share of tokens whose experts change with later tokens",
        lambda rows: finals(rows, "expert_choice", "leak"),
    ),
    Statement(
        "Expert choice does worse where it may not.",
        f"{_LOSS}: decoded causally less with its own choices",
        lambda rows: (
            finals(rows, "expert_choice", "loss_causal")
            - finals(rows, "expert_choice", "loss_chosen")
        ),
    ),
    Statement(
        "SMEBU's momentum improves its balance.",
        f"{_VIO} of smebu: beta 0 less beta 0.5",
        _gap("anatomy", "beta", "0", "0.5", "excess"),
    ),
    Statement(
        "SMEBU's soft clamp balances better than a nearly hard one of the same gain.",
        f"{_VIO} of smebu, lambda kappa held: kappa 8 less kappa 2",
        _gap("anatomy", "kappa at equal gain", "8", "2", "excess"),
    ),
    Statement(
        "SMEBU's lead over sign grows with the batch.",
        f"{_VIO}, each at its best, sign less smebu: at four times the rows less at a quarter",
        _batch_gap,
    ),
    Statement(
        "SMEBU brings a collapsed router's dead experts back.",
        f"{_DEAD} after as many steps again: gone on without less with smebu",
        _gap("rescue", "rescue", "none", "smebu", "dead"),
    ),
    Statement(
        "Quantile balancing brings back more of them than SMEBU.",
        f"{_DEAD} after as many steps again: smebu less quantile",
        _gap("rescue", "rescue", "smebu", "quantile", "dead"),
    ),
)
"""All statements, in the order they are printed."""


def claims(described: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The values of /claims."""
    rows = findings.table(described, results)
    judged = [findings.judge(statement.measure(rows)) for statement in CLAIMS]
    return {
        "statement": [statement.text for statement in CLAIMS],
        "statistic": [statement.statistic for statement in CLAIMS],
        **{name: [getattr(j, name) for j in judged] for name in findings.Judged._fields},
    }
