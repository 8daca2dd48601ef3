"""The commands: what is printed where, what an exit code means, and how little is loaded to say it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import jax
import pytest

import pkv
from pkv import cli
from pkv.competition import Tokenizer, compose, parse, train_tokenizer
from pkv.config import UserError
from pkv.model import Arch, init_params, save_params

ROOT = Path(pkv.__file__).parent.parent
ARCH = Arch(
    vocab_size=400, hidden=32, layers=2, heads=4, kv_heads=2, head_size=8, ffn=48, qkv_bias=True, max_positions=256
)
FIGHTERS = {"pirate": "Arr, 2 + 2 = 4.", "knight": "Verily 4.", "viking": "4, by Odin."}
COMPLETION = compose(FIGHTERS, "The knight is right: 2 + 2 = 4.", "knight", "Answer: 4")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random model with a tokenizer and a system prompt of its own."""
    path = tmp_path_factory.mktemp("models") / "small"
    save_params(init_params(ARCH, jax.random.key(0)), ARCH, path)
    train_tokenizer([COMPLETION], 400, path)
    (path / "system_prompt.txt").write_text("Compete.")
    return str(path)


def write_lines(file: Path, *lines) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def sample_lines(capsys, model, file, *options) -> dict:
    code, out, _ = call(capsys, "sample", model, "--prompts", file, "--max-new-tokens", 12, *options)
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    found = {(line["id"], line["sample"]): line for line in lines}
    assert len(found) == len(lines)
    return found


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )


def test_importing_pkv_loads_next_to_nothing():
    heavy = ("numpy", "jax", "yaml", "transformers")
    code = f"import sys, pkv; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


def test_the_public_names_are_there_and_others_are_not():
    for name in pkv.__all__:
        assert getattr(pkv, name) is not None and name in dir(pkv)
    assert callable(pkv.train) and callable(pkv.sample) and callable(pkv.score)
    assert pkv.load_config("tiny").rounds
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = pkv.trian


def test_training_can_be_called_by_the_name_of_its_room():
    import pkv.train.loop

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pkv.train.loop, "train", lambda *arguments: seen.append(arguments))
        pkv.train("config", "folder", fresh=True)
    assert seen == [("config", "folder", True)]


def test_the_version_is_the_packages(capsys):
    code, out, _ = call(capsys, "--version")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert code == 0 and out.strip() in (known, "0+not.installed")


def test_help_and_score_start_fast_and_without_jax(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"id": 1, "question": "2 + 2?", "answer": 4, "completion": COMPLETION})
    for command in (["--help"], ["score", file], ["score", file, "--config", "tiny"]):
        code = f"""if __name__ == "__main__":
            import sys, time
            from pkv.cli import main
            try: code = main({command!r})
            except SystemExit as end: code = end.code
            print(code or 0, "jax" in sys.modules, time.process_time(), file=sys.stderr)"""
        done = run_python(code)
        exit_code, jax_loaded, took = done.stderr.splitlines()[-1].split()
        assert (exit_code, jax_loaded) == ("0", "False") and done.stdout
        assert float(took) < 2, f"{command}: {took} s"  # of the processor, as other tests may run beside this one


def test_python_m_pkv_lists_every_command_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert not end.value.code
    for command in ("train", "eval", "sample", "score", "chat", "export", "report", "bench", "plan", "doctor"):
        assert f"• {command}" in shown
    assert "serve" not in shown


def test_score_writes_the_contracts_lines_in_order(capsys, tmp_path):
    good = {"id": "a", "question": "2 + 2?", "answer": "4", "completion": COMPLETION}
    code, out, err = call(capsys, "score", write_lines(tmp_path / "a.jsonl", good, good | {"id": 2, "completion": "4"}))
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 0 and err == "" and (first["id"], second["id"]) == ("a", 2)
    assert set(first) == {"id", "rewards", "total", "errors", "blocks", "final_answer"}
    assert first["rewards"]["correctness"] == 1.0 and first["rewards"]["winner"] == 1.0 and first["errors"] == []
    start, stop = first["blocks"]["knight"]
    assert COMPLETION[start:stop].strip() == FIGHTERS["knight"] and second["errors"]
    assert first["total"] > second["total"]


def test_scores_lengths_are_counted_in_the_tokens_of_the_configs_model(capsys, model, tmp_path):
    working = "By Odin, I hew 96 into 80 and 16: 80 wants 20 hives, 16 wants 4 more, so 20 + 4 = 24 hives will do it!"
    text = compose(FIGHTERS | {"viking": working * 2}, "All are right.", "knight", "Answer: 4")
    file = write_lines(tmp_path / "a.jsonl", {"id": 1, "question": "?", "answer": 4, "completion": text})
    lengths = {}
    for name, path in (("tokens", model), ("words", "")):
        config = tmp_path / f"{name}.yaml"
        rounds = "[{name: a, length_optimum: 1000}, {name: b, length_optimum: 2000}]"
        config.write_text(f"model: {{path: {path!r}}}\nrounds: {rounds}\n")
        for options in (["--round", "a"], []):
            code, out, _ = call(capsys, "score", file, "--config", config, *options)
            assert code == 0
            lengths[name, bool(options)] = json.loads(out)["rewards"]["length_viking"]
    tokenizer = Tokenizer.load(model)
    offsets = tokenizer.decode_with_offsets(tokenizer.encode(text))[1]
    tokens, words = (parse(text, each).blocks["viking"].tokens.size for each in (offsets, None))
    assert tokens > words and lengths["words", True] > 0
    assert lengths["tokens", True] / lengths["words", True] == pytest.approx(tokens / words)
    assert lengths["tokens", False] == pytest.approx(lengths["tokens", True] / 2)  # without --round it is the last
    code, _, err = call(capsys, "score", file, "--config", config, "--round", "c")
    assert code == 2 and "--round c: no such round; there are: a, b" in err


def test_sample_writes_the_contracts_lines(capsys, model, tmp_path):
    first, second = {"id": "a", "prompt": "How many?"}, {"id": 2, "prompt": "And now?"}
    found = sample_lines(capsys, model, write_lines(tmp_path / "p.jsonl", first, second), "--samples", 3)
    assert set(found) == {(name, sample) for name in ("a", 2) for sample in range(3)}
    tokenizer = Tokenizer.load(model)
    for line in found.values():
        assert set(line) == {"id", "sample", "tokens", "text", "logprobs", "finish"}
        assert len(line["tokens"]) == len(line["logprobs"]) and all(p <= 0 for p in line["logprobs"])
        assert line["text"] == tokenizer.decode(line["tokens"]) and line["finish"] in ("stop", "length")
        assert line["finish"] == "stop" or len(line["tokens"]) == 12
    assert len({tuple(line["tokens"]) for line in found.values()}) == 6
    file = write_lines(tmp_path / "q.jsonl", second)  # what is drawn depends on seed, id and sample only
    again, other = (sample_lines(capsys, model, file, "--samples", 2, "--seed", seed) for seed in (0, 1))
    for sample in range(2):
        assert again[2, sample]["tokens"] == found[2, sample]["tokens"] != other[2, sample]["tokens"]


def test_a_prompt_is_the_same_as_text_as_messages_and_raw(capsys, model, tmp_path):
    question = {"role": "user", "content": "How many?"}
    system = {"role": "system", "content": "Compete."}
    greedy = ("--temperature", 0)
    prompts = {"text": "How many?", "messages": [question], "whole": [system, question]}
    file = write_lines(tmp_path / "p.jsonl", *({"id": name, "prompt": prompt} for name, prompt in prompts.items()))
    found = sample_lines(capsys, model, file, *greedy)
    assert found["text", 0]["tokens"] == found["messages", 0]["tokens"] == found["whole", 0]["tokens"]
    others = [
        {"id": "raw", "prompt": "How many?", "raw": True},
        {"id": "own", "prompt": [{**system, "content": "Be brief and dull."}, question]},
    ]
    other = sample_lines(capsys, model, write_lines(tmp_path / "q.jsonl", *others), *greedy)
    text = found["text", 0]["logprobs"], found["text", 0]["tokens"]
    assert all((other[name, 0]["logprobs"], other[name, 0]["tokens"]) != text for name in ("raw", "own"))
    (raw,) = pkv.sample(model, [{"id": "raw", "prompt": "How many?", "raw": True}], max_new_tokens=12)
    assert raw["id"] == "raw"


def test_sampling_in_python_refuses_a_seed_of_more_than_32_bits():
    with pytest.raises(UserError, match="seed: expected at most 4294967295"):
        next(pkv.sample("m", [{"id": "a", "prompt": "How many?"}], seed=2**32))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"}', "line 2: 'id' is missing"),
        ('{"id": "b"}', "line 2: 'prompt' is missing"),
        ('{"id": "b", "prompt": 3}', "line 2: 'prompt': expected text, or messages"),
        ('{"id": "b", "prompt": [{"role": "user"}]}', "line 2: 'prompt': expected text, or messages"),
        ('{"id": "b", "prompt": []}', "line 2: 'prompt': expected text, or messages"),
        ('{"id": "b", "prompt": "x", "raw": 1}', "line 2: 'raw': expected true or false"),
        ('{"id": "b", "prompt": [{"role": "user", "content": "x"}], "raw": true}', "a raw prompt must be text"),
        ('{"id": "a", "prompt": "x"}', "line 2: the id 'a' is used twice"),
        ('{"id": true, "prompt": "x"}', "line 2: 'id': expected text or a whole number"),
        ('{"id": "\\ud800", "prompt": "x"}', "line 2: 'id': expected text or a whole number"),
        ('{"id": "b", "prompt": "\\ud83d x"}', "line 2: 'prompt': got '\\ud83d', half of a character"),
        ('{"id": "b", "prompt": "\\udc80", "raw": true}', "line 2: 'prompt': got '\\udc80', half of a"),
        ("[1]", "line 2: expected an object"),
        ("{", "line 2: not a JSON object"),
        ('{"id": "b", "prompt": "", "raw": true}', "prompt 'b': a prompt of 0 tokens"),
        ('{"id": "b", "prompt": "' + "x1" * 400 + '"}', "prompt 'b': a prompt of"),
    ],
)
def test_a_prompt_line_that_cannot_be_used_is_named(capsys, model, tmp_path, line, words):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "a", "prompt": "x"}\n' + line + "\n")
    code, out, err = call(capsys, "sample", model, "--prompts", file)
    assert code == 2 and out == "" and words in err.splitlines()[-1] and "Traceback" not in err
    assert err.count("pkv: ") == 1, "beside it only the bar of a model that takes long to load"


def test_new_tokens_are_held_to_the_models_context(capsys, model, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", {"id": "a", "prompt": "How many?"})
    code, _, err = call(capsys, "sample", model, "--prompts", file, "--max-new-tokens", 256)
    assert code == 2 and "--max-new-tokens 256: expected 1 to 2" in err and "256 positions" in err
    code, _, err = call(capsys, "sample", model, "--prompts", file, "--max-new-tokens", 0)
    assert code == 2 and "--max-new-tokens 0: expected 1 to" in err


def test_eval_measures_in_json_and_in_words(capsys, model, tmp_path):
    problems = [{"id": str(n), "question": f"{n} + 1?", "answer": str(n + 1)} for n in range(5)]
    file = write_lines(tmp_path / "d.jsonl", *problems)
    options = ("eval", model, "--data", file, "--limit", 3, "--max-new-tokens", 8)
    code, out, err = call(capsys, *options, "--json")
    measured = json.loads(out)
    assert code == 0 and (measured["problems"], measured["samples"], measured["data"]) == (3, 1, file) and "3/3" in err
    assert measured["metrics"]["length/tokens"] <= 8 and 0 <= measured["metrics"]["accuracy"] <= 1
    code, out, _ = call(capsys, *options)
    assert code == 0
    for name, value in measured["metrics"].items():
        assert f"{name:<32} {value:10.4f}" in out


def test_chat_answers_once_and_in_lines(capsys, model, monkeypatch):
    options = ("chat", model, "--max-new-tokens", 6, "--once", "How many?")
    code, out, _ = call(capsys, *options)
    assert code == 0 and "cut off at 6 tokens" in out
    code, out, err = call(capsys, *options, "--json")
    reply = json.loads(out)
    assert code == 0 and reply["finish"] == "length" and reply["note"] in err and reply["winner"] is None
    monkeypatch.setattr("sys.stdin", open_text("First?\nSecond?\nexit\nThird?\n"))
    code, out, _ = call(capsys, "chat", model, "--max-new-tokens", 6, "--json")
    assert code == 0 and [json.loads(line)["question"] for line in out.splitlines()] == ["First?", "Second?"]


def open_text(text):
    import io

    return io.StringIO(text)


def test_export_says_where(capsys, model, tmp_path):
    code, out, _ = call(capsys, "export", model, tmp_path / "out", "--json")
    assert code == 0 and json.loads(out) == {"exported": str(tmp_path / "out")}
    code, out, err = call(capsys, "export", model, tmp_path / "out")
    assert code == 2 and "not an empty directory" in err and out == ""


def test_report_says_where(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "round": "format", "accuracy": 0.5}\n')
    code, out, _ = call(capsys, "report", tmp_path, "--json")
    assert code == 0 and json.loads(out) == {"report": str(tmp_path / "report.html")}
    assert (tmp_path / "report.html").is_file()


def replace_train(monkeypatch, train):
    import pkv.train.loop
    import pkv.train.summary

    monkeypatch.setattr(pkv.train.loop, "train", train)
    monkeypatch.setattr(pkv.train.summary, "closing_summary", lambda folder: f"summary of {folder}")


def test_train_takes_the_configs_settings_as_flags(capsys, tmp_path, monkeypatch):
    seen = []

    def train(config, folder, fresh):
        seen.append((config, folder, fresh))
        print("a library that prints")
        folder.mkdir(parents=True)
        (folder / "evaluations.jsonl").write_text('{"step": 3, "metrics": {"accuracy": 0.5}}\n')

    replace_train(monkeypatch, train)
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "train", "tiny", "--rounds.format.steps", 7, "--fresh", "--grpo.samples=4")
    config, folder, fresh = seen.pop()
    assert code == 0 and fresh and folder == Path("runs/tiny") and "summary of runs/tiny" in out
    assert config.grpo.samples == 4 and next(r for r in config.rounds if r.name == "format").steps == 7
    code, out, err = call(capsys, "train", "tiny", "--run", "mine", "--json")
    assert code == 0 and seen[0][1:] == (Path("mine"), False) and "a library that prints" in err and "summary" in err
    assert json.loads(out) == {"run": "mine", "evaluations": [{"step": 3, "metrics": {"accuracy": 0.5}}]}


def test_an_interrupted_training_says_how_it_goes_on(capsys, tmp_path, monkeypatch):
    def train(*_):
        raise KeyboardInterrupt

    replace_train(monkeypatch, train)
    code, out, err = call(capsys, "train", "tiny", "--run", tmp_path / "run")
    assert code == 130 and err.strip() == "pkv: interrupted; the same command resumes at the last checkpoint"
    assert "a right answer is worth" in out and "summary" not in out, "what can be earned is said before the start"


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def train(*_):
        raise ZeroDivisionError("ours")

    replace_train(monkeypatch, train)
    with pytest.raises(ZeroDivisionError):  # Python then prints the traceback and exits with 1
        cli.main(["train", "tiny", "--run", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Expected one of {train, eval"),
        (["scor", "x"], "scor: no such command; did you mean 'score'?"),
        (["score"], "FILE"),
        (["score", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["sample", "m", "--prompts", "x", "--sample", "3"], "--sample: unknown argument; did you mean --samples?"),
        (["sample", "m", "--prompts", "x", "--samples", "many"], "--samples: invalid literal"),
        (["sample", "m", "--prompts", "x", "--samples", "0"], "--samples 0: expected at least 1"),
        (["sample", "m", "--prompts", "x", "--top-p", "2"], "sampling.top_p: expected at most 1"),
        (["sample", "m", "--prompts", "x", "--seed", str(2**32)], "seed: expected at most 4294967295, got 4294967296"),
        (["eval", "m", "--data", "x", "--seed", str(2**63)], "seed: expected at most 4294967295"),
        (["chat", "m", "--once", "hi", "--seed", "-1"], "seed: expected at least 0, got -1"),
        (["sample", "m", "--prompts", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["eval", "m", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["eval", "m", "--data", "arithmetic:heldout", "--samples", "4"], "at temperature 0 all are the same"),
        (["chat", "./nowhere", "--once", "hi"], "./nowhere: no such directory"),
        (["export", "./nowhere", "out"], "./nowhere: no such directory"),
        (["report", "nowhere"], "nowhere: no metrics.jsonl"),
        (["train", "tinny"], "tinny: no such config file; did you mean 'tiny'?"),
        (["train", "tiny", "--gpro.samples", "3"], "gpro: unknown key; did you mean 'grpo'?"),
        (["train", "tiny", "more"], "'more': expected a flag such as --section.key value"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("pkv: ") and err.count("\n") == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_away_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def fail(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    code, out, err = call(capsys, "chat", "owner/away", "--once", "hi")
    assert code == 1 and out == "" and err.startswith("pkv: owner/away: the hub did not give it: timed out")
    assert err.count("\n") == 1


def test_who_reads_only_the_head_gets_no_traceback(tmp_path):
    lines = ({"id": n, "question": "?", "answer": 4, "completion": "Answer: 4" * 2000} for n in range(40))
    file = write_lines(tmp_path / "a.jsonl", *lines)
    command = [sys.executable, "-m", "pkv", "score", file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["id"] == 0
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1
