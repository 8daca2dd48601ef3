"""The bench: one JSON object a command, counting the tokens that count, of work that is the same in every run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import statistics

import jax
import numpy as np
import pytest

from pkv import bench, cli
from pkv.bench import Task, Trainer, bytes_read, credit, draw_prompts, draw_requests, draw_responses
from pkv.competition import Tokenizer, train_tokenizer
from pkv.compiling import Compilations
from pkv.config import Config, GrpoConfig, MeshConfig, ModelConfig, SamplingConfig
from pkv.evaluate import load_policy
from pkv.evaluate.policy import sampling_mesh
from pkv.mesh import make_mesh
from pkv.model import Arch, init_params, save_params
from pkv.sampling import Completion, Engine

ARCH = Arch(
    vocab_size=400, hidden=16, layers=1, heads=4, kv_heads=2, head_size=8, ffn=32, qkv_bias=True, max_positions=256
)
ENDS = (2, *range(340, 400))  # so many that responses end at unequal lengths
PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, RUNS = 2, 4, 9, 24, 2
SAMPLING = {"temperature": 1.0, "slots": 4, "segment": 4}
UPDATE = {
    "row_tokens": 64,
    "micro_rows": 8,
    "share_prompts": True,
    "remat": "none",
}  # 4 rows would not go over the tests' 8 devices
PHASES = {"sample": ["sample"], "update": ["update"], "step": ["sample", "update"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "small"
    save_params(init_params(ARCH, jax.random.key(0)), ARCH, path)
    train_tokenizer(["How many hives make 20 candles?"], 300, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ENDS)}))
    return str(path)


def flags(settings) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def results(model) -> dict:
    """What each command wrote to stdout and to stderr."""
    size = {"prompts": PROMPTS, "samples": SAMPLES, "prompt_tokens": PROMPT_TOKENS, "max_new_tokens": NEW_TOKENS}
    own = {"sample": [*flags(SAMPLING), "--json"], "update": ["--row-tokens", "64"], "step": ["--segment", "4"]}
    found = {}
    for what, more in own.items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["bench", what, "--model", model, *flags(size), "--runs", str(RUNS), *more])
        assert code == 0, err.getvalue()
        found[what] = out.getvalue(), err.getvalue()
    return found


def task(row_tokens: int = 64, new_tokens: int = NEW_TOKENS, samples: int = SAMPLES, path: str = "") -> Task:
    grpo = GrpoConfig(prompts=PROMPTS, samples=samples, row_tokens=row_tokens)
    return Task(Config(model=ModelConfig(path), grpo=grpo), PROMPT_TOKENS, new_tokens)


@pytest.mark.parametrize("what", PHASES)
def test_each_command_writes_one_object_of_the_contract(results, model, what):
    out, err = results[what]
    (line,) = out.splitlines()
    result = json.loads(line)
    assert set(result) == {
        *("bench", "model", "settings", "device", "tokens_per_s", "step_s", "seconds", "lengths"),
        *("compile_s", "compilations", "compilations_in_runs", "peak_memory_gb", "runs"),
        *(() if what == "sample" else ("update_tflops", "matrix_tflops")),
        *(() if what == "update" else ("kv_ratio",)),
        *(("read_gbs", "memory_gbs") if what == "sample" else ()),
    }
    assert (result["bench"], result["model"]) == (what, model)
    assert len(result["runs"]) == RUNS and list(result["seconds"]) == PHASES[what]
    for run in result["runs"]:
        assert run["step_s"] == pytest.approx(sum(run["seconds"].values())) and list(run["seconds"]) == PHASES[what]
        assert run["tokens_per_s"] == pytest.approx(run["tokens"] / run["step_s"])
        assert run["lengths"]["mean"] == run["tokens"] / (PROMPTS * SAMPLES) <= run["lengths"]["longest"] <= NEW_TOKENS
    for name in ("tokens_per_s", "step_s"):
        assert result[name] == statistics.median(run[name] for run in result["runs"])
    assert result["compilations"] > 0 and result["compile_s"] > 0
    assert result["compilations_in_runs"] == sum(run["compilations"] for run in result["runs"])
    if what != "update":
        assert result["kv_ratio"] == statistics.median(run["kv_ratio"] for run in result["runs"]) > 0
        assert f"keys and values {result['kv_ratio']:.2f} of what lives" in err
    assert result["peak_memory_gb"]["host"] > 0 and result["peak_memory_gb"]["devices"] == []
    assert result["device"] == {"kind": "cpu", "count": 8}
    assert f"bench {what} {RUNS + 1}/{RUNS + 1}" in err and f"{what}: " in err and "peak memory" in err


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_every_weight_once_but_for_embeddings_that_it_only_looks_up(tied):
    arch = dataclasses.replace(ARCH, tied_embeddings=tied)
    params = init_params(arch, jax.random.key(0))
    engine = Engine(arch, SamplingConfig(), ENDS, make_mesh(MeshConfig(), jax.devices()[:1]))
    engine.usage.steps, engine.usage.read_bytes = 3, 7.0
    looked_up = 0 if tied else params["embedding"].nbytes
    once = sum(array.nbytes for array in jax.tree.leaves(params)) - looked_up
    assert bytes_read(engine.load(params), engine) == 3 * once + 7


def test_the_settings_are_those_that_are_read(results):
    common = {"prompts": PROMPTS, "samples": SAMPLES, "prompt_tokens": PROMPT_TOKENS, "max_new_tokens": NEW_TOKENS}
    common |= {"seed": 0, "dtype": "float32"}
    settings = {what: json.loads(out)["settings"] for what, (out, _) in results.items()}
    assert settings["sample"] == common | SAMPLING
    assert settings["update"] == common | UPDATE
    assert settings["step"] == common | SAMPLING | {"slots": 64} | UPDATE | {"row_tokens": 256}


def test_every_run_does_the_same_work_and_the_update_compiles_nothing_anew(results):
    for out, _ in results.values():
        assert len({json.dumps([run["tokens"], run["lengths"]]) for run in json.loads(out)["runs"]}) == 1
    assert json.loads(results["update"][0])["compilations_in_runs"] == 0


def test_tokens_count_up_to_and_with_the_first_end_token(results, model):
    mesh = sampling_mesh(model)
    policy = load_policy(model, mesh)
    assert policy.tokenizer.stop_ids == ENDS
    engine = Engine(ARCH, SamplingConfig(slots=4, segment=4), (), mesh)  # no end at all
    asked = draw_requests(task(), draw_prompts(task(), policy.tokenizer))
    whole = [done.tokens for done in engine.sample(engine.load(policy.params), asked)]
    assert {len(tokens) for tokens in whole} == {NEW_TOKENS}
    counted = [next((n for n, t in enumerate(tokens, 1) if t in ENDS), NEW_TOKENS) for tokens in whole]
    (run, *_) = json.loads(results["sample"][0])["runs"]
    assert (run["tokens"], run["lengths"]["longest"]) == (sum(counted), max(counted))
    assert min(counted) < NEW_TOKENS and len(set(counted)) > 1, "the case must show early ends"


def test_prompts_and_made_up_responses_are_text_ids(model):
    tokenizer = Tokenizer.load(model)
    asked = task(new_tokens=80, row_tokens=128, samples=500)
    sequences = draw_responses(asked, tokenizer, ARCH.vocab_size)
    assert len(sequences) == PROMPTS * 500
    prompts = {sequence.prompt.tobytes() for sequence in sequences}
    assert prompts == {prompt.tobytes() for prompt in draw_prompts(asked, tokenizer)} and len(prompts) == PROMPTS
    lengths = np.array([len(sequence.response) for sequence in sequences])
    assert lengths.max() == 80 and lengths.min() >= 1 and lengths.mean() == pytest.approx(20, rel=0.1)
    for sequence in sequences:
        assert len(sequence.prompt) == PROMPT_TOKENS and len(set(sequence.advantages)) == 1
        assert set(map(int, (*sequence.prompt, *sequence.response))) <= set(tokenizer.text_ids.tolist()) - set(ENDS)
        np.testing.assert_allclose(sequence.logprobs, -math.log(ARCH.vocab_size), atol=0.1)


def test_an_update_changes_no_weight(model):
    asked = task(path=model)
    trainer = Trainer(asked, load_policy(model, make_mesh(asked.config.mesh)))
    before = jax.device_get(trainer.params)
    trainer.update(draw_responses(asked, Tokenizer.load(model), ARCH.vocab_size))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(trainer.params))


def test_made_up_advantages_follow_the_lengths_within_a_group():
    prompts = [np.array([5], np.int32), np.array([6, 7], np.int32)]
    lengths = {(1, 1): 8, (0, 0): 3, (0, 1): 1, (1, 0): 15}  # in the order in which they ended; rewards 1, 3, 1, 1
    done = [
        Completion(r, s, np.full(n, 9, np.int32), np.full(n, -2.0), np.full(n, -3.0), "stop", np.zeros(n, bool))
        for (r, s), n in lengths.items()
    ]
    found = credit(task(samples=2), prompts, done)
    assert [len(sequence.prompt) for sequence in found] == [2, 1, 1, 2]
    for sequence, n, expected in zip(found, lengths.values(), (0, 1, -1, 0), strict=True):
        np.testing.assert_allclose(sequence.advantages, [expected] * n)
        np.testing.assert_array_equal(sequence.logprobs, np.full(n, -2.0))


def test_compilation_that_overlaps_counts_once_and_only_while_it_is_listened_to():
    spans = [("jaxpr_trace", 2, 3), ("jaxpr_trace", 1, 4), ("backend_compile", 5, 7), ("backend_compile", 6, 8)]
    with Compilations() as heard:
        for name, start, stop in spans:
            jax.monitoring.record_event_time_span(f"/jax/core/compile/{name}_duration", start, stop, fun_name="f")
        jax.monitoring.record_event_time_span("/jax/other", 0, 100)
    jax.monitoring.record_event_time_span("/jax/core/compile/backend_compile_duration", 8, 9)
    assert (heard.count, heard.seconds) == (2, 6)
    with Compilations() as heard:
        jax.jit(lambda x: x * 3)(np.float32(2))
    assert heard.count == 1 and heard.seconds > 0


def test_what_devices_count_is_their_greatest_use(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": 3 * 2**30}), Device(None), Device({"bytes_in_use": 1})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert bench.device_peaks_gb() == [3.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "WHAT"),
        (["sampel", "--model", "m"], "'sampel'"),
        (["sample"], "--model"),
        (["sample", "--model", "m", "--prompts", "0"], "--prompts 0: expected at least 1"),
        (["sample", "--model", "m", "--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
        (["sample", "--model", "m", "--runs", "0"], "--runs 0: expected at least 1"),
        (["sample", "--model", "m", "--slots", "0"], "sampling.slots: expected at least 1"),
        (["sample", "--model", "m", "--temperature", "-1"], "sampling.temperature: expected at least 0"),
        (["sample", "--model", "m", "--remat", "all"], "--remat: pkv bench sample has no use for it"),
        (["sample", "--model", "m", "--moments", "float8"], "--moments: pkv bench sample has no use for it"),
        (["sample", "--model", "m", "--row-tokens", "64"], "--row-tokens: pkv bench sample has no use for it"),
        (["update", "--model", "m", "--segment", "8"], "--segment: pkv bench update has no use for it"),
        (["update", "--model", "m", "--micro-rows", "0"], "grpo.micro_rows: expected at least 1"),
        (["step", "--model", "m", "--row-tokens", "1000"], "--row-tokens 1000: a prompt of 140 tokens and 1024 new"),
        (["step", "--model", "m", "--sample", "3"], "--sample: unknown argument; did you mean --samples?"),
        (["step", "--model", "m", "--dtype", "float16"], "float16"),
        (["step", "--model", "./nowhere"], "./nowhere: no such directory"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(capsys, arguments, words):
    code = cli.main(["bench", *arguments])
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "" and words in printed.err
    assert printed.err.startswith("pkv: ") and printed.err.count("\n") == 1


def test_responses_are_held_to_the_models_context(capsys, model):
    for what in PHASES:
        code = cli.main(["bench", what, "--model", model, "--prompt-tokens", "200", "--max-new-tokens", "57"])
        err = capsys.readouterr().err
        assert code == 2 and "--max-new-tokens 57: the model holds 256 positions" in err and err.count("\n") == 1
