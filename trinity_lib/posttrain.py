"""From any checkpoint: answers, preferences, verified rewards, one stage after another.

python -m trinity_lib.posttrain --config F          # PosttrainConfig as JSON
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import xarray as xr
from safetensors.torch import save_file

from trinity_lib import (
    checkpoint,
    disk,
    examination,
    hub,
    loads,
    lora,
    optim,
    stages,
)
from trinity_lib.config import Refusal, from_file, one_sentence, to_json
from trinity_lib.experts import use_backend
from trinity_lib.posttrain_config import PosttrainConfig, Stage
from trinity_lib.posttrain_session import Session, done, products_dtype, stage_name, start
from trinity_lib.progress import Progress
from trinity_lib.run import fresh_name
from trinity_lib.student import Measures, Student, balancer_of, optimizers, share
from trinity_lib.train import RUNS, reproducible


def run(config: PosttrainConfig, *, runs: Path = RUNS, resume: bool = False) -> xr.DataTree:
    """Post-train as `config` says and return the run, which is also a file in `runs`.

    The end of every stage is a checkpoint folder in the released layout with a chat template;
    the last is `runs/NAME/instruct`. The same configuration on the same machine gives the
    same bits. With `resume` a named run that was cut off goes on from the end of its last
    whole stage, to the same bits. Raises Taken where the name is taken, TrainingFailed where
    the loss is no number; the run then says `failed` and why.
    """
    if not config.name:
        config = dataclasses.replace(config, name=fresh_name("posttrain", config))
    with reproducible(config.threads, config.device):
        session = start(config, runs, resume)
        try:
            if not session.marks:
                _examine(session)
            whole = done(session.writer.folder, config)
            for number, stage in list(enumerate(config.stages))[len(whole) :]:
                _learn(session, number, stage)
            session.progress.close()
            session.writer.close("complete")
        except BaseException as error:
            session.progress.close()
            known = isinstance(error, Refusal)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            session.writer.close("failed", reason)
            raise
        assert session.writer.whole is not None
        return session.writer.whole


def _learn(session: Session, number: int, stage: Stage) -> None:
    """One whole stage: adapters on, steps, adapters merged, the exam, the checkpoint."""
    config, model = session.config, session.model
    rng = np.random.default_rng([config.seed, number])
    student = Student(config, model, session.template, balancer_of(config, model), [], [])
    method = _method(session, student, stage, rng)
    if config.lora is None:
        student.trained = list(model.parameters())
    else:
        found = lora.attach(model, config.lora, int(rng.integers(2**62)))
        student.trained = list(found.values())
    student.optimizers = optimizers(model, config, student.trained)
    for n in range(stage.steps):
        begun = time.perf_counter()
        part = stage.rate * share(stage, n, config.warmup)
        optim.set_rate(student.optimizers, part)
        measures = method.step(student)
        session.step += 1
        _record(session, number, measures, part * config.rate, student, begun)
    if config.lora is not None:
        lora.merge(model)
        use_backend(model, config.experts, products_dtype(config))
    _examine(session)
    _save(session, stage_name(config, number), student)


def _method(
    session: Session, student: Student, stage: Stage, rng: np.random.Generator
) -> stages.Method:
    config, template = session.config, session.template
    if stage.kind == "dpo":
        return stages.Preferences(stage, student, list(session.given.pairs.values()), rng)
    names = config.data if stage.kind == "sft" else config.problems
    tasks = [session.given.questions[name] for name in names]
    if stage.kind == "grpo":
        return stages.Rewards(stage, student, tasks, rng)
    encoded = [[template.encode(q.conversation) for q in task] for task in tasks]
    return stages.Supervised(stage, encoded, rng)


def _record(
    session: Session, number: int, m: Measures, rate: float, student: Student, begun: float
) -> None:
    load_LE = m.load_LE.cpu().numpy()
    bias_LE = student.balancer.bias_LE.float().cpu().numpy()
    max_vio_L, entropy_L = loads.max_vio(load_LE), loads.load_entropy(load_LE)
    names = ("loss", "accuracy", "margin", "reward", "kl", "clipped", "grad_norm")
    values = {name: getattr(m, name) for name in names}
    values |= {"stage": number, "learning_rate": rate, "max_vio": float(np.mean(max_vio_L))}
    values |= {"batch_tokens": m.tokens, "seconds": time.perf_counter() - begun}
    session.writer.append("posttrain", session.step, values)
    layers = {
        "max_vio": max_vio_L,
        "min_vio": loads.min_vio(load_LE),
        "load_entropy": entropy_L,
        "effective_experts": np.exp(entropy_L),
        "bias_std": bias_LE.std(-1),
        "bias_range": np.ptp(bias_LE, -1),
    }
    session.writer.append("layers", session.step, layers)
    if session.step % session.config.record_every == 0:
        session.writer.append("routing", session.step, {"count": load_LE, "bias": bias_LE})
    kind = session.config.stages[number].kind
    told = f"reward {m.reward:.3f}" if kind == "grpo" else f"loss {m.loss:.3f}"
    session.progress.step(kind, told, f"accuracy {m.accuracy:.2f}")


def _examine(session: Session) -> None:
    """Put the exam, and write down all that came of it so far."""
    config, exam = session.config, session.exam
    marks = examination.sit(session.model, session.template, exam, config.sequence_length)
    session.marks.append(marks._asdict())
    moments = 1 + len(config.stages)
    tasks, asked = exam.tasks, exam.questions
    answers = {name: np.full((moments, len(tasks)), np.nan) for name in ("accuracy", "formed")}
    said = np.full((moments, len(asked)), "", dtype=object)
    for moment, each in enumerate(session.marks):
        for name, values in answers.items():
            values[moment] = np.array(each[name], dtype=float)
        said[moment] = [_plain(text) for text in each["said"]]
    counts = [exam.count(task) for task in tasks]
    session.writer.table("answers", {**answers, "questions": counts})
    table = {
        "subject": [q.task for q in asked],
        "asked": [_plain(q.key) for q in asked],
        "wanted": [_plain(q.answer) for q in asked],
        "said": said,
    }
    session.writer.table("transcripts", table)
    session.writer.flush()
    shown = [f"{t} {a:.2f}" for t, a in zip(tasks, marks.accuracy, strict=True)]
    _say(session.progress, f"  right answers: {'  '.join(shown)}")


def _plain(text: str) -> str:
    """As it can be stored: HDF5 ends a text at a zero byte, which a model may well say."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}")


def _say(progress: Progress, text: str) -> None:
    """A line that stays."""
    if progress.bar is None:
        print(text, flush=True)
    else:
        progress.bar.write(text)


def _save(session: Session, name: str, student: Student) -> None:
    """Write a checkpoint, whole or not at all."""

    def write(temporary: Path) -> None:
        hub.write(session.model, temporary, tokenizer=session.template.vocabulary)
        session.template.write(temporary)
        state = {f"balancer.{k}": v.cpu() for k, v in student.balancer.state().items()}
        save_file(state, temporary / checkpoint.STATE, metadata={"format": "pt"})
        facts = {"step": session.step, "marks": session.marks}
        (temporary / checkpoint.FACTS).write_text(json.dumps(facts))
        (temporary / checkpoint.RUN).write_text(to_json(session.config))
        files = {p.name: checkpoint.described(p) for p in sorted(temporary.iterdir())}
        manifest = {"step": session.step, "files": files}
        (temporary / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1))

    disk.replace_folder(session.writer.folder / name, write)


def main() -> None:
    """Post-train as a configuration file says and print the run's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="PosttrainConfig as JSON")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of run files")
    parser.add_argument("--resume", action="store_true", help="go on from the last stage")
    given = parser.parse_args()
    with one_sentence():
        config = from_file(PosttrainConfig, given.config)
        tree = run(config, runs=given.runs, resume=given.resume)
        print(given.runs / f"{tree.attrs['name']}.nc")


if __name__ == "__main__":
    main()
