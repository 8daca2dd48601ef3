"""The config: every mistake is one line that names the path, and no knob is there for show."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from pkv.config import (
    Config,
    ConfigError,
    UserError,
    as_plain,
    find_config,
    knobs,
    load_config,
    parse_config,
    shipped_configs,
)
from pkv.mesh import AXES

PACKAGE = Path(knobs.__file__).parent.parent


def write(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def sections(kind=Config, path=""):
    """Every dataclass of the config by path, `*` for a list's items."""
    yield path, kind
    for field in dataclasses.fields(kind):
        inner = getattr(knobs, str(field.type).removeprefix("tuple[").split(",")[0], None)
        if dataclasses.is_dataclass(inner):
            star = ".*" if str(field.type).startswith("tuple") else ""
            yield from sections(inner, f"{path}.{field.name}{star}".strip("."))


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grpo: {smaples: 8}", r"grpo\.smaples: unknown key; did you mean 'grpo\.samples'\?"),
        ("gpro: {samples: 8}", r"gpro: unknown key; did you mean 'grpo'\?"),
        ("rounds: [{name: a, stepz: 3}]", r"rounds\.0\.stepz: unknown key; did you mean 'rounds\.0\.steps'"),
        ("model: {zzz: 1}", r"model\.zzz: unknown key; expected one of path, "),
        ("model: {dtype: float16}", r"model\.dtype: expected one of float32, bfloat16; got 'float16'; did you mean"),
        ("grpo: {samples: eight}", r"grpo\.samples: expected a whole number, got 'eight' \(text\)"),
        ("grpo: {samples: 8.0}", r"grpo\.samples: expected a whole number, got 8\.0"),
        ("grpo: {samples: true}", r"grpo\.samples: expected a whole number, got True \(true or false\)"),
        ("grpo: {mask_truncated: 1}", r"grpo\.mask_truncated: expected true or false"),
        ("model: {path: 3}", r"model\.path: expected text, got 3"),
        ("grpo: {samples: }", r"grpo\.samples: expected a whole number, got nothing"),
        ("grpo: 3", r"grpo: expected a section with keys, got 3"),
        ("grpo: {samples: 1}", r"grpo\.samples: expected at least 2, got 1"),
        ("sampling: {top_p: 0}", r"sampling\.top_p: expected at least"),
        ("sampling: {top_p: 1.5}", r"sampling\.top_p: expected at most 1, got 1\.5"),
        ("sampling: {temperature: .nan}", r"sampling\.temperature: expected a number, got nan"),
        ("sampling: {kv_memory_gb: .inf}", r"sampling\.kv_memory_gb: expected at most 1000000, got inf"),
        ("rewards: {timeout_s: .inf}", r"rewards\.timeout_s: expected at most 1000000, got inf"),
        ("grpo: {loss: {kl_weight: .inf}}", r"grpo\.loss\.kl_weight: expected at most 1000000, got inf"),
        ("warmup: {learning_rate: -1e-3}", r"warmup\.learning_rate: expected at least 0, got -0\.001"),
        ("warmup: {final_learning_rate: 1e3}", r"warmup\.final_learning_rate: expected at most 1, got 1000\.0"),
        ("optimizer: {name: muon, moments: float8}", r"optimizer\.moments: float8 is for adamw"),
        ("optimizer: {b2: 1.0}", r"optimizer\.b2: expected at most 0\.999999, got 1\.0"),
        ("seed: -1", r"seed: expected at least 0, got -1"),
        ("grpo: {combine: total}", r"grpo\.combine: a total has no owner"),
        ("grpo: {refills: 2}", r"grpo\.refills: nearly every group differs"),
        ("grpo: {loss: {reject: 0.9}}", r"grpo\.loss\.reject: expected 0 \(off\) or more than 1"),
        ("grpo: {loss: {dual_clip: 1.0}}", r"grpo\.loss\.dual_clip: expected 0"),
        ("grpo: {loss: {kl_weight: 0.1}}\nmodel: {init: random}", r"grpo\.loss\.kl_weight: random weights"),
        ("data: {hardest: 0.9, easiest: 0.1}", r"data\.hardest: expected at most data\.easiest, 0\.1; got 0\.9"),
        ("rounds: [{name: a, max_new_tokens: 8, budgets: [4, 9]}]", r"rounds\.a\.budgets: expected growing numbers"),
        ("rounds: [{name: a, samples: 1}]", r"rounds\.a\.samples: expected 0 .* got 1"),
        ("rounds: [{name: a, max_new_tokens: 8}]\ngrpo: {overlong_tokens: 8}", r"grpo\.overlong_tokens: .* 8 is"),
        ("rounds: [{name: a}, {name: a}]", r"rounds\.1\.name: 'a' is used twice"),
        ("rounds: [{name: warm-up}]", r"rounds\.0\.name: 'warm-up' is what the supervised start is called"),
        ("rounds: [{steps: 3}]", r"rounds\.0\.name: missing"),
        ("rounds: {name: a}", r"rounds: expected a list, got a section"),
        ("rounds: [{name: a, max_new_tokens: 0}]", r"rounds\.0\.max_new_tokens: expected at least 1, got 0"),
        ("rounds: [{name: a, weights: [1]}]", r"rounds\.0\.weights: expected `name: value` lines"),
        ("rounds: [{name: a, weights: {format: much}}]", r"rounds\.0\.weights\.format: expected a number"),
        ("model: {lora: {rnak: 8}}", r"model\.lora\.rnak: unknown key; did you mean 'model\.lora\.rank'"),
        ("model: {lora: {rank: -1}}", r"model\.lora\.rank: expected at least 0, got -1"),
        ("model: {lora: {base: nf4}}", r"model\.lora\.base: nothing reads it at rank 0; set model\.lora\.rank"),
        ("model: {lora: {rank: 8, base: in8}}", r"model\.lora\.base: expected one of .*; did you mean 'int8'"),
        ("model: {lora: {rank: 8, targets: []}}", r"model\.lora\.targets: expected different names, at least one"),
        ("model: {lora: {rank: 8, targets: [q, q]}}", r"model\.lora\.targets: expected different names"),
        ("model: {lora: {rank: 8, targets: [q, gate_proj]}}", r"model\.lora\.targets\.1: .*; did you mean 'gate'"),
        ("model: {lora: {rank: 8}}\noptimizer: {name: muon}", r"optimizer\.name: muon .* LoRA .* expected adamw"),
        ("- 1", r"expected sections such as `model:`, got a list of 1"),
        ("a: [", r"not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_with_its_path(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_scientific_numbers_and_whole_numbers_pass_as_numbers(tmp_path):
    text = "rounds: [{name: a, learning_rate: 1e-4, weights: {format: 1}}]"
    assert yaml.safe_load("1e-4") == "1e-4"  # YAML 1.1 makes a text of it
    (round_,) = load_config(write(tmp_path, text)).rounds
    assert round_.learning_rate == 1e-4 and round_.weights == {"format": 1.0}
    assert type(round_.weights["format"]) is float


def test_a_directory_that_is_there_is_a_whole_path_and_anything_else_a_hub_id(tmp_path, monkeypatch):
    for place in ("beside/owner/small", "here/owner/small", "here/owner/other"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")

    def path(name: str) -> str:
        return load_config(write(tmp_path / "beside", f"model: {{path: {name}}}")).model.path

    assert path("owner/small") == str(tmp_path / "beside" / "owner" / "small")
    assert path("owner/other") == str(tmp_path / "here" / "owner" / "other")
    assert (path("owner/nowhere"), path("''")) == ("owner/nowhere", "")


def test_lists_become_tuples_and_dicts_stay_dicts(tmp_path):
    text = "rewards: {user_files: [a.py, b.py]}\ngrpo: {whole_trace: {correctness: 0.5, winner: 1}}"
    config = load_config(write(tmp_path, text))
    assert config.rewards.user_files == ("a.py", "b.py")
    assert config.grpo.whole_trace == {"correctness": 0.5, "winner": 1.0}


def test_flags_go_over_the_file_and_the_last_one_wins(tmp_path):
    file = write(tmp_path, "seed: 3\nrounds: [{name: format, steps: 9}, {name: aha, steps: 9}]")
    flags = ["--grpo.samples", "4", "--grpo.samples=6", "--rounds.aha.steps", "2", "--rounds.0.learning-rate=1e-5"]
    config = load_config(file, [*flags, "--rounds.format.weights.winner", "2", "--rewards.user_files", "[a.py]"])
    assert (config.seed, config.grpo.samples, [r.steps for r in config.rounds]) == (3, 6, [9, 2])
    assert config.rounds[0].learning_rate == 1e-5 and config.rounds[0].weights == {"winner": 2.0}
    assert config.rewards.user_files == ("a.py",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--grpo.samples"], "expected a value after it"),
        (["grpo.samples", "4"], "expected a flag such as --section.key value"),
        (["--grpo.sample", "4"], r"did you mean 'grpo\.samples'"),
        (["--rounds.longer.steps", "4"], r"rounds\.longer: no such item 'longer'; there are 1: format"),
        (["--seed.a.b", "4"], r"seed\.a: nothing can be set inside 3"),
        (["--seed.a", "4"], "seed is 3 .*which has no settings inside"),
        (["--grpo.samples", "["], "cannot read the value"),
    ],
)
def test_a_wrong_flag_is_one_line(tmp_path, flags, words):
    file = write(tmp_path, "seed: 3\nrounds: [{name: format}]")
    with pytest.raises(ConfigError, match=words):
        load_config(file, flags)


def test_every_bound_is_of_a_knob_and_keeps_its_default():
    kinds = dict(sections())
    for path, (least, greatest) in knobs.BOUNDS.items():
        section, _, name = path.rpartition(".")
        default = getattr(kinds[section](), name)
        assert least <= default <= greatest, path


def test_a_config_survives_being_written(tmp_path):
    config = parse_config({"rounds": [{"name": "a", "weights": {"format": 1.0}}], "rewards": {"user_files": ["x.py"]}})
    assert load_config(write(tmp_path, yaml.safe_dump(as_plain(config)))) == config


def test_a_relative_model_is_looked_up_beside_the_file(tmp_path):
    (tmp_path / "tiny").mkdir()
    file = write(tmp_path, "model: {path: tiny}")
    assert load_config(file).model.path == str((tmp_path / "tiny").resolve())
    assert load_config(write(tmp_path, "model: {path: owner/name}")).model.path == "owner/name"


def test_every_shipped_config_builds_and_goes_by_its_name():
    assert "tiny" in shipped_configs()
    for name, file in shipped_configs().items():
        assert find_config(name) == file
        config = load_config(name)
        assert config.rounds, name
        if config.model.init == "random":
            assert (Path(config.model.path) / "config.json").is_file(), name


def test_a_missing_config_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"tinny\.yaml: no such config file; did you mean 'tiny'"):
        find_config("tinny.yaml")
    with pytest.raises(UserError, match=r"shipped configs: .*tiny"):
        find_config("zzz")
    with pytest.raises(UserError, match="is a directory"):
        find_config(tmp_path)


def test_every_knob_is_read_somewhere():
    code = "\n".join(f.read_text(encoding="utf-8") for f in PACKAGE.rglob("*.py") if f.name != "config.py")
    names = {(path, field.name) for path, kind in sections() for field in dataclasses.fields(kind)}
    assert len(names) > 50
    assert {name for path, name in names if path == "mesh"} == set(AXES)  # read together, in make_mesh
    names = {(path, name) for path, name in names if path != "mesh"}
    unread = [f"{path}.{name}" for path, name in sorted(names) if not re.search(rf"\.{name}\b", code)]
    assert unread == []
