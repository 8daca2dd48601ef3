"""The whole loop on a model of a few thousand weights: killed and resumed = never killed, and nothing is mixed up."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow.parquet as parquet
import pytest
import yaml
from tiny_run import make_config

from pkv import checkpoint
from pkv.competition import Tokenizer
from pkv.config import Config, GrpoConfig, RoundConfig, UserError, WarmupConfig, as_plain, load_config
from pkv.data.arithmetic import problems
from pkv.evaluate import Sampled, load_policy
from pkv.evaluate.measures import FACTS
from pkv.mesh import make_mesh
from pkv.model import read_config, split
from pkv.records import Prompt, Rollout
from pkv.rewards import ScoringPool
from pkv.sampling import rehearse
from pkv.train import interrupts, loop
from pkv.train.interrupts import stop_requests
from pkv.train.journal import check_stepped, shown, step_metrics
from pkv.train.loop import train
from pkv.train.rounds import check_requirement, reward_budgets, stages
from pkv.train.run import Run, _settled, open_run
from pkv.train.setup import build, open_training
from pkv.train.summary import closing_summary
from pkv.train.waiting import as_arrays, from_arrays
from pkv.train.warmup import demonstrations


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return make_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(load_config(config_file), folder)
    return folder


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in found]


def final_state(folder: Path, config_file: Path, flags=(), steps=5):
    setup = build(load_config(config_file, flags))
    return checkpoint.restore(folder / "checkpoints", steps, setup.learner.init(setup.policy.params))[0]


@pytest.mark.slow
def test_rollouts_and_evaluations_of_a_stage_are_compiled_before_it(config_file, tmp_path):
    setup = build(load_config(config_file, ["--evaluate.temperature=0"]))
    run, state = open_training(setup, tmp_path / "run", fresh=False)
    warm_up, first, _ = stages(setup.config)
    setup.warm_up(state, warm_up, 0)
    laid, measuring = setup.engine.compilations, setup.heldout_engine.compilations
    assert measuring > 0
    setup.warm_up(state, first, 2)
    assert setup.engine.compilations > laid
    with ScoringPool(first.weights, first.length_optimum, setup.config.rewards) as scoring:
        loop.measure(setup, run, state, first, scoring, "before first")
    assert setup.heldout_engine.compilations == measuring


def test_a_rounds_refills_are_compiled_before_it_too(config_file, tmp_path):
    """However many groups lack a signal; what all prompts begin with is as long for one prompt as for all."""
    flags = ["--grpo.refills=1", '--grpo.signal=["correctness"]', "--grpo.prompts=4"]
    setup, asked = build(load_config(config_file, flags)), []
    run, state = open_training(setup, tmp_path / "run", fresh=False)
    listening = {engine: lambda _, requests: asked.append(requests) for engine in (setup.engine, setup.heldout_engine)}
    _, first, _ = stages(setup.config)
    dataclasses.replace(setup, compile_ahead=listening).warm_up(state, first, 2)
    assert [len(requests) for requests in asked] == [4, len(setup.heldout), 2, 1]
    beginnings = {
        next(call.arguments[0].shape for call in rehearse(setup.engine, requests) if call.name == "prefix")
        for requests in asked
    }
    assert len(beginnings) == 1
    run.close()


@pytest.mark.parametrize(
    "short, long",
    [("{n} + 1?", "1 + " * 2000 + "1?"), ("{n}? " + "How many candles do 6 hives make? " * 9, "蜡烛" * 85)],
)
def test_a_training_prompt_that_leaves_no_room_is_said_before_the_first_step(config_file, tmp_path, short, long):
    """Else the step that draws it ends the run, and so it would whenever the run goes on."""
    data = tmp_path / "train.jsonl"
    questions = [*(short.format(n=n) for n in range(100)), long]
    data.write_text("".join(json.dumps({"question": one, "answer": "1"}) + "\n" for one in questions))
    with pytest.raises(UserError, match=r"prompts and max_new_tokens need [0-9,]+: raise it or lower them"):
        build(load_config(config_file, ["--data.train", str(data), "--warmup.steps=0"]))


def test_a_run_leaves_what_the_contract_says(whole):
    assert [line["step"] for line in lines(whole)] == [0, 1, 2, 3, 4]
    assert [line["round"] for line in lines(whole)] == ["warm-up"] * 2 + ["first"] * 2 + ["second"]
    assert [e["name"] for e in lines(whole, "evaluations.jsonl")] == [
        "after warm-up",
        "after first",
        "before second",  # its responses may be longer
        "after second",
    ]
    assert "made_with" in yaml.safe_load((whole / "config.yaml").read_text())
    assert (whole / "tb").is_dir() and checkpoint.latest(whole / "checkpoints") == 5
    table = parquet.read_table(whole / "rollouts" / "step-000003.parquet")
    assert table.num_rows == 8 and {"text", "reward/correctness", "facts", "tokens", "policy_step"} <= set(
        table.column_names
    )
    assert set(table["policy_step"].to_pylist()) == {3}
    assert "after second" in closing_summary(whole)


def test_on_policy_updates_agree_with_the_sampler(whole):
    for line in lines(whole)[2:]:
        assert line["groups/silent"] == 0 and line["policy/gradient_norm"] > 0
        assert line["policy/kl_sampler"] < 1e-6
        assert line["policy/clipped_low"] == line["policy/clipped_high"] == 0


LORA = ["--model.lora.rank=4", "--model.lora.base=nf4", "--mesh={data: 8, fsdp: 1, tensor: 1}", "--grpo.micro_rows=8"]


@pytest.fixture(scope="module")
def whole_lora(config_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(load_config(config_file, LORA), folder)
    return folder


@pytest.mark.parametrize("killed_after", [1, 3])
def test_killed_and_resumed_is_never_killed(whole, config_file, tmp_path, monkeypatch, killed_after):
    check_resumed(whole, config_file, tmp_path / "run", monkeypatch, killed_after, [])


def test_a_lora_run_killed_and_resumed_is_never_killed(whole_lora, config_file, tmp_path, monkeypatch):
    check_resumed(whole_lora, config_file, tmp_path / "run", monkeypatch, 3, LORA)


def check_resumed(whole, config_file, folder, monkeypatch, killed_after, flags, steps=5):
    step_of = {"warmup_step": loop.warmup_step, "grpo_step": loop.grpo_step}

    def dies(name):
        def step(setup, run, state, stage, number, scoring):
            result = step_of[name](setup, run, state, stage, number, scoring)
            if number == killed_after:  # its line is written, its checkpoint is not
                raise KeyboardInterrupt
            return result

        return step

    with monkeypatch.context() as patch:
        for name in step_of:
            patch.setattr(loop, name, dies(name))
        with pytest.raises(KeyboardInterrupt):
            train(load_config(config_file, flags), folder)
    assert checkpoint.latest(folder / "checkpoints") == killed_after
    train(load_config(config_file, flags), folder)
    assert lines(folder) == lines(whole)
    assert lines(folder, "evaluations.jsonl") == lines(whole, "evaluations.jsonl")
    states = [final_state(run, config_file, flags, steps) for run in (folder, whole)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_going_on_with_a_run_makes_no_fresh_state_beside_the_restored_one(whole, config_file, monkeypatch):
    setup = build(load_config(config_file))
    fresh = setup.learner.template(setup.policy.params)
    before, trained = live_bytes(), sum(array.nbytes for array in jax.tree.leaves(setup.policy.params))
    at_restore, restore = [], checkpoint.restore

    def watched(folder, step, template):
        at_restore.append(live_bytes())
        return restore(folder, step, template)

    monkeypatch.setattr(checkpoint, "restore", watched)
    run, state = open_training(setup, whole, fresh=False)
    run.close()
    assert at_restore == [before - trained], "the weights that the run began with are gone, and nothing is new"
    jax.tree.map(np.testing.assert_array_equal, state, final_state(whole, config_file))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, fresh))


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_leaves_word_and_the_second_stops(number, capfd, monkeypatch):
    before = signal.getsignal(number)
    with stop_requests() as asked_to_stop:
        assert not asked_to_stop()
        signal.raise_signal(number)
        assert asked_to_stop()
        signal.raise_signal(number)  # the same one: `timeout` sends it twice
        monkeypatch.setattr(interrupts, "ONE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert "once more to stop at once" in capfd.readouterr().err


def test_a_run_asked_to_stop_saves_the_step_it_is_in(whole, config_file, tmp_path, monkeypatch):
    warmup_step, folder = loop.warmup_step, tmp_path / "run"

    def rung(*arguments):
        signal.raise_signal(signal.SIGINT)
        return warmup_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "warmup_step", rung)
        with pytest.raises(KeyboardInterrupt):
            train(load_config(config_file, ["--checkpoint.every", "1000"]), folder)
    assert checkpoint.latest(folder / "checkpoints") == len(lines(folder)) == 1
    train(load_config(config_file), folder)
    assert lines(folder) == lines(whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_goes_on_when_it_is_given_again(whole, config_file, tmp_path, how):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "pkv", "train", str(config_file), "--run", str(folder)]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 1:  # most of the work is still to come
            assert running.poll() is None and time.monotonic() - began < 300
            time.sleep(0.05)
        running.send_signal(how)
        said = running.communicate(timeout=120)[1]
    assert 1 <= len(lines(folder)) < 5, said
    if how != signal.SIGKILL:
        assert running.returncode == 130 and "Traceback" not in said and "the same command resumes" in said, said
        assert checkpoint.latest(folder / "checkpoints") == len(lines(folder))  # nothing is done twice
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert lines(folder) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, *(final_state(run, config_file) for run in (folder, whole)))


def test_a_finished_run_is_left_as_it_is(whole, config_file):
    before = lines(whole), lines(whole, "evaluations.jsonl")
    train(load_config(config_file), whole)
    assert before == (lines(whole), lines(whole, "evaluations.jsonl"))


def test_a_run_that_goes_on_showing_other_questions_ends_with_those_that_both_show(whole, tmp_path):
    """`evaluate.shown` may change when a run goes on, and the questions of a host with the number of hosts."""
    first, *_, last = lines(whole, "evaluations.jsonl")
    asked = [sample["question"] for sample in first["samples"]]
    last["samples"].reverse()
    del last["samples"][0]
    text = "".join(json.dumps(line) + "\n" for line in (first, last))
    (tmp_path / "evaluations.jsonl").write_text(text)
    said = closing_summary(tmp_path)
    assert asked[0] in said and asked[1] not in said and "after second" in said


def test_a_run_made_by_another_config_is_refused(whole, config_file):
    with pytest.raises(UserError, match=r"grpo.samples is 4 there and 2 here; use --fresh"):
        train(load_config(config_file, ["--grpo.samples", "2"]), whole)


def test_a_requirement_that_is_not_met_can_be_lowered_in_its_run(whole, config_file, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="rounds that haven't begun may be changed"):
        train(load_config(config_file, ["--rounds.second.require={format: 2.0}"]), folder)
    with pytest.raises(UserError, match=r"rounds.0.learning_rate is 1e-06 there and 0.1 here"):
        train(load_config(config_file, ["--rounds.first.learning_rate=0.1"]), folder)
    train(load_config(config_file), folder)
    assert lines(folder) == lines(whole)
    assert lines(folder, "evaluations.jsonl") == lines(whole, "evaluations.jsonl")
    assert (folder / "config.yaml").read_text() == (whole / "config.yaml").read_text()


@pytest.mark.slow
def test_a_requirement_of_the_first_round_is_open_until_it_begins_but_not_what_measured_the_warm_up(
    whole, config_file, tmp_path
):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"rounds.first.require.format: at least 2 is required"):
        train(load_config(config_file, ["--rounds.first.require={format: 2.0}"]), folder)
    with pytest.raises(UserError, match=r"rounds.0.max_new_tokens is 24 there and 16 here"):
        train(load_config(config_file, ["--rounds.first.max_new_tokens=16"]), folder)
    config = yaml.safe_load(config_file.read_text())
    config["rounds"].insert(0, config["rounds"][0] | {"name": "easier", "steps": 1})
    eased = config_file.with_name("eased.yaml")
    eased.write_text(yaml.safe_dump(config))
    train(load_config(eased), folder)
    assert [line["round"] for line in lines(folder)] == ["warm-up"] * 2 + ["easier", "first", "first", "second"]
    assert lines(folder)[:2] == lines(whole)[:2]


def test_rounds_that_come_to_a_warm_up_alone_measure_as_it_was_measured():
    made = as_plain(Config(warmup=WarmupConfig(steps=5)))
    alike, shorter = ([as_plain(RoundConfig(name="a", steps=3, max_new_tokens=most))] for most in (1024, 24))
    assert _settled(made, made["rounds"], 5) == _settled(made, alike, 5) != _settled(made, shorter, 5)
    assert _settled(made, shorter, 0) == [], "nothing has begun"


def test_a_finished_run_is_given_another_round(whole, config_file, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    config = yaml.safe_load(config_file.read_text())
    config["rounds"].append(config["rounds"][1] | {"name": "third", "max_new_tokens": 40})
    longer = config_file.with_name("longer.yaml")
    longer.write_text(yaml.safe_dump(config))
    train(load_config(longer), folder)
    assert lines(folder)[:-1] == lines(whole) and lines(folder)[-1]["round"] == "third"
    assert [one["name"] for one in lines(folder, "evaluations.jsonl")[-2:]] == ["before third", "after third"]
    with pytest.raises(UserError, match=r"rounds.2.name is 'third' there and None here"):
        train(load_config(config_file), folder)


@pytest.mark.slow
def test_a_start_that_was_measured_is_measured_anew_where_its_round_changes(whole, config_file, tmp_path, monkeypatch):
    def dies(setup, run, state, stage, number, scoring, step=loop.grpo_step):
        if stage.name == "second":
            raise KeyboardInterrupt
        return step(setup, run, state, stage, number, scoring)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "grpo_step", dies)
        train(load_config(config_file, ["--rounds.second.max_new_tokens=16"]), folder)
    assert lines(folder, "evaluations.jsonl")[-1]["name"] == "before second"
    train(load_config(config_file), folder)
    assert lines(folder, "evaluations.jsonl") == lines(whole, "evaluations.jsonl")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_killed_while_it_began_begins_again(whole, config_file, tmp_path, monkeypatch, fresh):
    """Else the command that is given again, as after a spot machine's end, would be refused its own directory."""
    setup, folder = build(load_config(config_file)), tmp_path / "run"
    if fresh:
        shutil.copytree(whole, folder)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(setup.policy.tokenizer), "save", killed)
        open_run(setup.config, folder, setup.policy, setup.model_config, fresh)
    with open_run(setup.config, folder, setup.policy, setup.model_config, False) as run:
        assert run.step == 0 and not (folder / "checkpoints").exists() and not lines(folder)
    assert (folder / "config.yaml").read_text() == (whole / "config.yaml").read_text()
    assert {path.name for path in (folder / "model").iterdir()} == {path.name for path in (whole / "model").iterdir()}
    assert not (folder / "config.yaml.partial").exists()


def test_a_run_that_is_older_than_a_knob_has_its_default(whole, config_file, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    file, setup = folder / "config.yaml", build(load_config(config_file))
    older = yaml.safe_load(file.read_text())
    del older["sampling"]["weights"], older["rounds"][0]["fighter_tokens"], older["grpo"]["loss"]["reject"]
    file.write_text(yaml.safe_dump(older, sort_keys=False))
    open_run(setup.config, folder, setup.policy, setup.model_config, False).close()
    other = dataclasses.replace(setup.config, sampling=dataclasses.replace(setup.config.sampling, weights="int8"))
    with pytest.raises(UserError, match=r"sampling.weights is 'plain' there and 'int8' here"):
        open_run(other, folder, setup.policy, setup.model_config, False)


def test_a_run_without_a_share_that_is_the_default_goes_on(config_file, tmp_path):
    """A mapping is one knob: pure block credit, `whole_trace: {}`, is not the default with nothing changed."""
    setup = build(load_config(config_file, ["--grpo.whole_trace={}"]))
    for _ in range(2):
        open_run(setup.config, tmp_path / "run", setup.policy, setup.model_config, False).close()


def test_a_directory_with_something_else_in_it_is_refused(config_file, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(UserError, match="holds no run of pkv"):
            train(load_config(config_file), tmp_path, fresh=fresh)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_stretched_model_is_trained_and_left_as_such(config_file):
    setup = build(load_config(config_file, ["--model.context", "2048"]))
    assert setup.policy.arch.max_positions == 2048 and setup.policy.arch.rope_scaling.factor == 4
    assert setup.engine.programs.arch == setup.policy.arch
    assert setup.model_config["rope_scaling"]["factor"] == 4, "what the run's directory and its export say"


def test_a_run_is_a_model(whole, config_file):
    policy = load_policy(str(whole), make_mesh(load_config(config_file).mesh))
    assert policy.step == 5
    assert policy.system.startswith("Hold a <competition>")
    jax.tree.map(np.testing.assert_array_equal, policy.params, final_state(whole, config_file).params)


def test_a_run_stops_where_its_model_stops(config_file, tmp_path):
    """Stop tokens of generation_config.json that the tokenizer doesn't name, such as Llama 3's and Gemma's."""
    base = shutil.copytree(config_file.parent / "model", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    policy = SimpleNamespace(system="Compete.", tokenizer=Tokenizer.load(base))
    config = load_config(config_file, ["--model.path", str(base)])
    open_run(config, tmp_path / "run", policy, read_config(base), fresh=False).close()
    again = Tokenizer.load(tmp_path / "run" / "model")
    assert again.stop_ids == policy.tokenizer.stop_ids == (1, 2) and again.pad_id == policy.tokenizer.pad_id


def test_a_demonstration_ends_as_the_template_ends_an_answer(config_file, tmp_path):
    base = shutil.copytree(config_file.parent / "model", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))  # the end of a text comes first
    policy = SimpleNamespace(system="Compete.", tokenizer=Tokenizer.load(base))
    said = demonstrations(load_config(config_file), 0, problems("train", 20), policy)
    assert policy.tokenizer.stop_ids == (0, 2) and all(one.response[-1] == 2 for one in said)


def test_a_demonstration_longer_than_a_row_is_drawn_anew(config_file):
    """One of many thousands: a run must not end for it, in the middle of its warm-up."""
    tokenizer = Tokenizer.load(config_file.parent / "model")
    policy, chosen = SimpleNamespace(system="Compete.", tokenizer=tokenizer), problems("train", 20)
    drawn = lambda row: demonstrations(  # noqa: E731
        load_config(config_file, ["--warmup.demonstrations=40", f"--grpo.row_tokens={row}"]), 0, chosen, policy
    )
    sizes = [one.size for one in drawn(100_000)]
    most = int(np.quantile(sizes, 0.9))
    fitting = [one.size for one in drawn(most)]
    assert max(sizes) > most >= max(fitting) and len(fitting) == 40
    assert fitting[0] == sizes[0] or sizes[0] > most  # what fits is what it was
    with pytest.raises(UserError, match=r"^grpo.row_tokens: 100 is too short for a demonstration, .*: raise it$"):
        drawn(100)


def test_a_lora_run_is_a_model_though_its_checkpoints_hold_adapters_only(whole_lora, config_file):
    config = load_config(config_file, LORA)
    manifest = checkpoint.verify(whole_lora / "checkpoints", 5)
    kept = [name for name in manifest["arrays"] if name.startswith("params.")]
    assert len(kept) == 14 and all(name.endswith((".a", ".b")) for name in kept)
    policy, fresh = load_policy(str(whole_lora), make_mesh(config.mesh)), build(config).policy
    adapters, base = split(policy.params)
    jax.tree.map(np.testing.assert_array_equal, base, split(fresh.params)[1])
    jax.tree.map(np.testing.assert_array_equal, adapters, final_state(whole_lora, config_file, LORA).params)
    assert np.any(adapters["layers"]["ffn"]["up"].b)


def test_on_policy_lora_updates_agree_with_the_sampler(whole_lora):
    for line in lines(whole_lora)[2:]:
        assert line["policy/kl_sampler"] < 1e-6
        assert line["policy/clipped_low"] == line["policy/clipped_high"] == 0


def test_every_epoch_draws_every_problem_once(config_file):
    setup = build(load_config(config_file, ["--data.train", "arithmetic:train:count=6"]))
    drawn = [p.problem.id for step in range(2, 8) for p in setup.draw_prompts(step, 2, dict)]
    assert len(set(drawn[:6])) == 6 and set(drawn[:6]) == set(drawn[6:12])
    assert drawn[:6] != drawn[6:12]
    for step in range(2, 22):  # four of six: what is left of an epoch is not mixed with the next
        assert len({p.problem.id for p in setup.draw_prompts(step, 4, dict)}) == 4
    with pytest.raises(UserError, match=r"grpo.prompts: 8 a step, and data.train has 6 problems"):
        build(load_config(config_file, ["--data.train", "arithmetic:train:count=6", "--grpo.prompts=8"]))


def test_questions_in_both_splits_are_refused(config_file):
    with pytest.raises(UserError, match=r"data.heldout: \d+ questions are in data.train too"):
        build(load_config(config_file, ["--data.heldout", "arithmetic:train"]))


def test_a_budget_longer_than_a_row_is_found_before_the_first_step(config_file):
    with pytest.raises(UserError, match=r"grpo.row_tokens: 64 tokens"):
        build(load_config(config_file, ["--grpo.row_tokens", "64"]))


def test_a_round_waits_for_what_it_requires():
    round_ = RoundConfig(name="longer", require={"accuracy": 0.5})
    first, second = ({"name": name, "metrics": {}} for name in ("after first", "after second"))
    check_requirement(round_, [first | {"metrics": {"accuracy": 0.6}}])
    own_start = {"name": "before longer", "metrics": {"accuracy": 0.1}}  # by its own rules, when it was stopped there
    check_requirement(round_, [first | {"metrics": {"accuracy": 0.6}}, own_start])
    with pytest.raises(
        UserError, match=r"rounds.longer.require.accuracy: at least 0.5 is required, held-out it is 0.4"
    ):
        check_requirement(round_, [first | {"metrics": {"accuracy": 0.9}}, second | {"metrics": {"accuracy": 0.4}}])
    with pytest.raises(UserError, match="no such held-out metric"):
        check_requirement(round_, [first | {"metrics": {"format": 1.0}}])


@pytest.mark.slow
def test_a_round_that_has_begun_is_not_refused_by_what_it_measured_itself(config_file, tmp_path, monkeypatch):
    flags = [
        "--rounds.second.max_new_tokens=16",
        "--rounds.second.steps=2",
        "--rounds.second.require={length/tokens: 20}",
    ]
    train(load_config(config_file, flags), tmp_path / "whole")
    named = [json.loads(line) for line in (tmp_path / "whole" / "evaluations.jsonl").read_text().split("\n") if line]
    lengths = {one["name"]: one["metrics"]["length/tokens"] for one in named}
    assert lengths["after first"] >= 20 > lengths["before second"]
    check_resumed(tmp_path / "whole", config_file, tmp_path / "run", monkeypatch, 5, flags, steps=6)


def test_a_round_without_weights_is_found_before_the_first_step(config_file):
    with pytest.raises(UserError, match=r"rounds.first.weights: no reward has a weight"):
        build(load_config(config_file, ["--rounds.first.weights={}"]))


def test_an_unknown_reward_is_found_before_the_first_step(config_file):
    config = load_config(config_file, ["--rounds.second.weights", "{corectness: 1.0}"])
    with pytest.raises(UserError, match="did you mean 'correctness'"):
        stages(config)


def test_a_share_of_the_whole_trace_names_a_reward_or_a_family(config_file):
    def shares(text: str, *more: str):
        return stages(load_config(config_file, ["--grpo.whole_trace", text, *more]))[1].whole_trace

    found = shares("{format: 0.3, winner: 1}")
    assert found["tag_structure"] == found["competition_format"] == 0.3
    assert found["winner"] == 1.0 and found["correctness"] == 0.0
    assert set(shares("{format: 0.3}", "--grpo.credit", "sequence").values()) == {1.0}
    with pytest.raises(UserError, match=r"grpo\.whole_trace: unknown reward 'formt'; did you mean 'format'"):
        shares("{formt: 1}")
    with pytest.raises(UserError, match=r"grpo\.whole_trace\.tag_structure: expected a share from 0 to 1, got 2"):
        shares("{format: 2}")


@pytest.mark.parametrize(
    "flags",
    [
        ("--grpo.whole_trace", "{judge: 0.5}"),
        ("--grpo.credit", "sequence"),
        ("--grpo.credit", "sequence", "--grpo.combine", "total"),
    ],
)
def test_a_fighter_is_never_paid_for_rivals_that_err(config_file, flags):
    """With rates a name is worth more, the fewer others were right there: that is the judge's only."""
    stages(load_config(config_file, ["--grpo.judge_baseline", "rates"]))
    with pytest.raises(UserError, match=r"grpo\.judge_baseline: rates is for the judge's own tokens; expected credit"):
        stages(load_config(config_file, ["--grpo.judge_baseline", "rates", *flags]))


def test_every_round_says_what_can_be_earned(config_file, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def rewards():\n    return {'brevity': ('answer', lambda problem, trace: 1.0)}\n", encoding="utf-8"
    )
    weights = "{format: 1.0, correctness: 4.0, brevity: 0.5}"
    flags = ["--rewards.user_files", f"[{mine}]", "--rounds.second.weights", weights]
    flags += ["--rounds.first.weights", "{length: 1.0, format: 1.0}"]
    first, second = reward_budgets(load_config(config_file, flags)).split("\n\n")
    assert first.startswith("Round first") and "warning: a right answer is worth 0" in first
    assert second.startswith("Round second") and "a right answer is worth 4, everything else together 2" in second
    assert "brevity" in second and "warning" not in second


def test_the_curriculum_draws_what_is_neither_solved_nor_hopeless(config_file):
    flags = ["--data.train", "arithmetic:train:count=40", "--data.easiest", "0.9", "--data.revisit", "0.001"]
    setup = build(load_config(config_file, flags))
    solved = {problem.id: 1.0 for problem in setup.problems[:36]}
    drawn = [p.problem.id for step in range(10) for p in setup.draw_prompts(step, 2, lambda: solved)]
    assert sum(name in solved for name in drawn) <= 2, "4 of 40 are left, and drawn again and again"
    again = [p.problem.id for step in range(10) for p in setup.draw_prompts(step, 2, lambda: solved)]
    assert drawn == again
    few = setup.draw_prompts(0, 5, dict, refill=1, asked=[problem.id for problem in setup.problems[3:]])
    assert len(few) == 3, "no more than there are"


def test_pass_rates_read_from_disk_are_those_that_were_measured(whole):
    run = Run(whole, 5)
    try:
        rates = run.pass_rates()
    finally:
        run.close()
    table = parquet.read_table(whole / "rollouts" / "step-000004.parquet").to_pylist()
    last = {row["problem_id"]: [] for row in table}
    for row in table:
        last[row["problem_id"]].append(row["reward/correctness"] == 1.0)
    assert {name: rates[name] for name in last} == {name: np.mean(found) for name, found in last.items()}


def test_a_rounds_budget_grows_in_equal_parts(config_file):
    flags = ["--rounds.first.steps=6", "--rounds.first.budgets=[8, 16]"]
    stage = stages(load_config(config_file, flags))[1]
    assert [stage.budget(step) for step in range(stage.first, stage.stop)] == [8, 8, 16, 16, 24, 24]
    stage = stages(load_config(config_file, [*flags, "--rounds.first.steps=2"]))[1]
    assert [stage.budget(step) for step in range(stage.first, stage.stop)] == [16, 24], "the longest is always seen"


def test_a_run_whose_gradient_is_never_finite_stops_with_a_remedy():
    run = SimpleNamespace(skipped=0)
    for skipped in (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.25, 1.0, 1.0, 1.0, 1.0):
        check_stepped({"skipped": skipped}, run, 3)
    with pytest.raises(UserError, match=r"5 times in a row.*with a lower learning rate"):
        check_stepped({"skipped": 1.0}, run, 3)


def test_a_step_that_trains_on_nothing_says_nothing_of_what_it_trained_on():
    part = {"sampled": 8, "groups": 2, "silent": 1.0, "trained": [], "advantages": {}}
    setup = SimpleNamespace(grpo=GrpoConfig())
    stage = SimpleNamespace(name="first", weights={"correctness": 1.0})
    facts = dict.fromkeys(FACTS) | {"overlap/viking_pirate": 0.0, "overlap/viking_knight": 0.0}
    row = {"total": 0.0, "rewards": {"correctness": 0.0, "competition_format": 0.0}, "failed": {}, "facts": facts}
    row |= {"tokens": 4, "finish": "stop", "policy_step": 3, "kl_policy": 0.0}
    silent = {"skipped": 0.0}, 1e-6, {"sample": 1.0, "update": 0.1}
    line = step_metrics(setup, stage, 3, [row], [part], *silent)
    assert line["groups/silent"] == 1.0 and line["policy/skipped"] == 0.0 and line["perf/tokens_per_s"] == 8.0
    unknown = {"loss", "policy/entropy", "policy/gradient_norm", "policy/kl_sampler", "perf/update_tflops"}
    assert not unknown & set(line)
    assert shown(line)["silent"] == 1.0 and "silent" not in shown(line | {"groups/silent": 0.0})


ALL_AT_ONCE = [
    "--grpo.epochs=2",
    "--grpo.minibatches=2",
    "--grpo.share_prompts=true",
    "--grpo.whiten=tokens",
    "--grpo.baseline=leave_one_out",
    "--grpo.signal=[format, correctness, varied]",
    "--grpo.refills=1",
    "--grpo.overlong_tokens=4",
    "--grpo.loss.surrogate=gspo",
    "--grpo.loss.normalise=constant",
    "--grpo.loss.reject=2.0",
    "--grpo.loss.entropy=0.001",
    "--optimizer.moments=float8",
    "--data.easiest=0.9",
    "--rounds.first.budgets=[12]",
    "--rounds.first.samples=2",
    "--rounds.second.schedule=cosine",
    "--rounds.second.ramp_steps=1",
]


@pytest.mark.slow
def test_all_options_together_make_a_run_that_is_resumed_bit_for_bit(config_file, tmp_path, monkeypatch):
    train(load_config(config_file, ALL_AT_ONCE), tmp_path / "whole")
    (first, *_) = [line for line in lines(tmp_path / "whole") if line["phase"] == "grpo"]
    assert {"policy/rejected", "weighted/varied"} <= set(first)
    assert first["groups/silent"] < 1 and first["policy/gradient_norm"] > 0
    check_resumed(tmp_path / "whole", config_file, tmp_path / "run", monkeypatch, 3, ALL_AT_ONCE)


@pytest.mark.slow
def test_one_step_off_samples_ahead_within_a_round_and_is_resumed_bit_for_bit(config_file, tmp_path, monkeypatch):
    flags = ["--grpo.one_step_off=true", "--rounds.first.steps=3", "--rounds.first.fighter_tokens=4"]
    train(load_config(config_file, flags), tmp_path / "whole")
    steps = [line for line in lines(tmp_path / "whole") if line["phase"] == "grpo"]
    assert [line["policy/steps_behind"] for line in steps] == [0, 1, 1, 0]  # a round starts with its own policy
    kept = [checkpoint.read_beside(tmp_path / "whole" / "checkpoints", step) for step in range(3, 7)]
    assert [bool(arrays) for arrays in kept] == [True, True, False, False]
    for killed_after in (3, 4):  # what waits was sampled at once with this step's, and a step before it
        folder = tmp_path / f"run-{killed_after}"
        check_resumed(tmp_path / "whole", config_file, folder, monkeypatch, killed_after, flags, steps=6)


def test_rollouts_that_wait_are_the_same_when_they_are_read(config_file):
    draw = np.random.default_rng(0)
    known = problems("train", 3)

    def rollout(p: int, g: int) -> Rollout:
        size = int(draw.integers(1, 9))
        numbers = draw.normal(size=(2, size)).astype(np.float32)
        forced = draw.random(size) < 0.5 if (p + g) % 2 else None
        tokens = draw.integers(0, 600, size).astype(np.int32)
        return Rollout(known[p].id, g, tokens, *numbers, "stop" if g else "length", 7 + p, forced)

    wanted = [[rollout(p, g) for g in range(4)] for p in (2, 0)]
    prompts = [Prompt(known[p], np.zeros(3, np.int32)) for p in (2, 0)]
    arrays = as_arrays(Sampled(prompts, wanted, []))
    found, rollouts = from_arrays(arrays, known)
    assert found == [known[2], known[0]]
    for got, want in zip(itertools.chain(*rollouts), itertools.chain(*wanted), strict=True):
        for name, value in vars(want).items():
            np.testing.assert_array_equal(getattr(got, name), value, err_msg=name, strict=True)
    with pytest.raises(UserError, match=r"data.train.*not there any more"):
        from_arrays(arrays, known[:2])
