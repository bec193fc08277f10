"""A chain of checkpoints from one seed: TrueBase, Base, Instruct, and one debiased."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import xarray as xr

from trinity_lib import planted, polish, posttrain, record, truebase_config
from trinity_lib.config import BadValue, from_json
from trinity_lib.posttrain_config import PosttrainConfig
from trinity_lib.posttrain_session import LAST
from trinity_lib.run import RunConfig
from trinity_lib.train import train
from trinity_lib.truebase_config import STAGES, TruebaseConfig


def made(config: TruebaseConfig, number: int, runs: Path, cache: Path) -> dict[str, Path]:
    """Folder of every stage of chain `number`, trained unless it is there.

    Three runs, NAME-0, NAME-0-instruct and NAME-0-debiased for number 0, each with a run file.
    One that was cut off goes on. Raises BadValue where a name is another run's.
    """
    first = truebase_config.chain(config, number)
    _done(first, runs, partial(_trained, first, runs, cache))
    folders = {stage: runs / first.name / stage for stage in STAGES[:2]}
    files = _lessons(config, runs)
    for before, stage in zip(STAGES[1:], STAGES[2:], strict=False):
        init = str(folders[before])
        own = truebase_config.post_training(config, number, stage, init, files)
        _done(own, runs, partial(_post_trained, own, runs))
        folders[stage] = runs / own.name / LAST
    return folders


def innocent(config: TruebaseConfig, number: int, runs: Path, cache: Path) -> Path:
    """A checkpoint that never had the association: chain `number` of the null world.

    Of the same names, which were told of as often, in tokens of the same tokenizer, and
    post-trained alike but for answers about jobs, which are fair from the first. It differs in
    more than the association: the null world has no fact, frequency or leak of its own either,
    so that the lessons ask for facts its text never told, and no stage debiases it. The chain
    itself must be there.
    """
    null = dataclasses.replace(
        config,
        name=f"{config.name}-null",
        world=dataclasses.replace(config.world, planted=False),
    )
    first = truebase_config.chain(null, number)
    told = runs / truebase_config.chain(config, number).name / STAGES[1]
    # its own text would make another tokenizer, and the two are asked the same tokens
    own_data = dataclasses.replace(first.data, tokenizer=str(told))
    first = dataclasses.replace(first, data=own_data)
    _done(first, runs, partial(_trained, first, runs, cache))
    init = str(runs / first.name / STAGES[1])
    files = _lessons(config, runs)
    fair = {**files, "jobs": files["fair"]}
    own = truebase_config.post_training(null, number, STAGES[2], init, fair)
    _done(own, runs, partial(_post_trained, own, runs))
    return runs / own.name / LAST


def _lessons(config: TruebaseConfig, runs: Path) -> dict[str, str]:
    lessons = polish.write(planted.world(config.world), runs / config.name / "lessons")
    return {name: str(path) for name, path in lessons.items()}


def _trained(config: RunConfig, runs: Path, cache: Path, resume: bool) -> xr.DataTree:
    return train(config, runs=runs, cache=cache, resumes=resume)


def _post_trained(config: PosttrainConfig, runs: Path, resume: bool) -> xr.DataTree:
    return posttrain.run(config, runs=runs, resume=resume)


def _done(
    config: RunConfig | PosttrainConfig, runs: Path, work: Callable[[bool], xr.DataTree]
) -> None:
    """Do the work of a run that is not complete."""
    folder, file = runs / config.name, runs / f"{config.name}.nc"
    if file.is_file():
        old = from_json(type(config), record.read_attributes(folder)["config"])
        if old != config:
            raise BadValue(f"The run {config.name!r} is another one; choose another name.")
        print(f"{config.name} is complete", flush=True)
        return
    work((folder / "run.json").is_file())
