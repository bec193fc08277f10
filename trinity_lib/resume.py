"""Going on with a run that was cut off: which one, and whether it is the same run."""

import dataclasses
import json
from pathlib import Path

from trinity_lib import checkpoint, disk
from trinity_lib.config import BadValue, Missing, differences, from_json
from trinity_lib.optim import Phase
from trinity_lib.record import read_attributes
from trinity_lib.run import RunConfig, schedule

FREE = ("name", "phases", "parallel")
"""Settings that a comparison leaves out: phases are compared step by step, as far as done."""


def find(config: RunConfig, runs: Path, *, own_steps: bool = False) -> RunConfig:
    """The configuration to resume with, named after the run it resumes.

    With a name that run, without one the newest incomplete run of the same configuration,
    whatever its number of steps. `own_steps` takes the number of steps the run was begun
    with. Raises Missing where there is none, BadValue where anything but steps differs.
    """
    if config.name:
        folder = runs / config.name
        if not (folder / "run.json").is_file():
            return config  # claiming it says what it is, or it was killed before it began
        old = configuration(folder)
    else:
        found = _newest_alike(config, runs)
        if found is None:
            raise Missing(
                f"{runs} has no incomplete run of this configuration to resume; leave resume "
                "out to begin one, or name the run."
            )
        folder, old = found
    _require_same(config, old, folder)
    phases = old.phases if own_steps else config.phases
    return dataclasses.replace(config, name=folder.name, phases=phases)


def configuration(folder: Path) -> RunConfig:
    """The configuration a run was begun with; BadValue where it cannot be read."""
    text = read_attributes(folder).get("config", "{}")
    try:
        return from_json(RunConfig, text)
    except ValueError as error:
        raise BadValue(
            f"The run {folder.name!r} is of another version of this program: {error}"
        ) from error


def compare(
    config: RunConfig, old: RunConfig, folder: Path, part: int = 0, parts: int = 1
) -> int:
    """The step to go on from, 0 for the start; BadValue where it would be another run.

    The checkpoint of that step is verified, to the last byte; by `parts` ranks together.
    `steps` may change as long as every step that is done stays what it was.
    """
    _require_same(config, old, folder)
    latest = checkpoint.newest(folder)
    if latest is None:
        return 0
    done = checkpoint.verify(latest, part, parts)["step"]
    plan, before = schedule(config), schedule(old)
    if len(plan) < done:
        raise BadValue(
            f"steps is {len(plan)}; it must be at least {done}, what the run {folder.name!r} "
            "has done."
        )
    for number, (new, was) in enumerate(zip(plan[:done], before, strict=False)):
        mixtures = [c.phases[s.phase].mixture for c, s in ((config, new), (old, was))]
        if new != was or mixtures[0] != mixtures[1]:
            raise BadValue(
                f"steps is {len(plan)}; that would change step {number + 1}, which the run "
                f"{folder.name!r} has done: it had {len(before)} steps, and another number "
                "must leave what is done as it was."
            )
    return done


def _changed(config: RunConfig, old: RunConfig) -> list[str]:
    """What differs but for the name and the number of steps.

    A short schedule lacks phases, so one list of phases must be a part of the other.
    """
    new, was = ([_timeless(phase) for phase in c.phases] for c in (config, old))
    shorter, longer = sorted((new, was), key=len)
    rest = iter(longer)
    alike = all(any(phase == other for other in rest) for phase in shorter)
    differs = [] if alike else [f"phases are {new!r} and were {was!r}"]
    if len(new) == len(was):
        differs = [
            f"phase {i + 1}: {each}"
            for i, (a, b) in enumerate(zip(was, new, strict=True))
            for each in differences(a, b)
        ]
    return differences(old, config, FREE) + differs


def _timeless(phase: Phase) -> Phase:
    return dataclasses.replace(phase, tokens=1, larger_batch=None, warmup=0)


def _require_same(config: RunConfig, old: RunConfig, folder: Path) -> None:
    changed = _changed(config, old)
    if changed:
        raise BadValue(
            f"The run {folder.name!r} cannot be resumed so: {'; '.join(changed)}. Only steps "
            "and the ranks may change on resume."
        )


def _newest_alike(config: RunConfig, runs: Path) -> tuple[Path, RunConfig] | None:
    """The newest run folder of the same configuration that is neither complete nor live."""
    found = []
    for file in runs.glob("[!.]*/run.json"):
        folder = file.parent
        complete = folder.with_name(folder.name + ".nc").exists()
        if complete or disk.locked(folder / "lock"):
            continue
        try:
            old = configuration(folder)
        except BadValue:
            continue  # of another version or torn: not the same configuration
        if not _changed(config, old):
            found.append((json.loads(file.read_text())["created_at"], folder, old))
    if not found:
        return None
    _, folder, old = max(found, key=lambda entry: (entry[0], entry[1].name))
    return folder, old
