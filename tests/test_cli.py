"""The command line: help that teaches and is fast, one clear error each, exit codes that mean something."""

import json
import shutil
import subprocess
import sys

import pytest

import mens_core
from mens_core.cli import VERBS, main
from mens_core.contract import contract_fields

KERNELS = ("torch_lora", "torch_qlora", "jax_lora", "jax_qlora")


def _run(*words):
    return subprocess.run([sys.executable, "-m", "mens_core", *words], capture_output=True, text=True, check=False)


def test_help_lists_every_verb_and_names_its_own_help():
    done = _run("--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert all(f"{verb} {purpose}" in words for verb, purpose in VERBS.items())


def test_train_help_shows_every_field_with_its_unit_and_default():
    text = _run("train", "--help").stdout
    for section, field in contract_fields():
        assert field.metadata.get("flag", f"--{field.name.replace('_', '-')}") in text
        assert f"\n{section}:" in text
    words = " ".join(text.split())
    assert "Longest row. (tokens; default 1024)" in words
    assert "(default 0.0002) [Dettmers et al. 2023" in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--rnk", "3"], "did you mean --rank?"),
        (["train", "--rank", "three"], "rank must be a whole number of at least 1 (got 'three', from flag)"),
        (["train", "--rank", "three", "--alpha", "x"], "4 problems"),
        (["train"], "data_dir is required"),
        (["train", "--schedule=cosin"], "did you mean 'cosine'?"),
        (["train", "--preset", "tinny"], "did you mean 'tiny'?"),
        (
            ["plan", "--backend", "torch_qlora", "--method", "lora", "--data-dir=x", "--output-dir=y"],
            "forced_kernel_agrees",
        ),
        (["corpus", "pairs", "--outptu", "x"], "--output"),
        (["init-model", "--arch", "gpt3", "--output", "x"], "gpt2, llama, qwen2, qwen3"),
        (["nonsense"], "nonsense"),
        ([], "VERB"),
    ],
)
def test_words_that_make_no_sense_end_with_one_error_and_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err
    assert printed.err.count("error:") == 1
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_is_not_installed_is_an_error_that_helps(capsys, tmp_path, corpus_dir, model_dirs):
    words = ["train", "--data-dir", str(corpus_dir), "--output-dir", str(tmp_path / "run"), "--backend", "tensorflow"]
    assert main([*words, "--model", str(model_dirs["gpt2"])]) == 2
    printed = capsys.readouterr().err
    assert "there is no backend 'tensorflow'" in printed
    assert "torch, jax" in printed
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_trace():
    done = _run("train", "--debug")
    assert "Traceback" in done.stderr
    assert "data_dir is required" in done.stderr


def test_backends_lists_state_and_origin(capsys):
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["torch", "mens-core", "0.1.0"]
    assert lines[2].split()[:3] == ["jax", "mens-core", "0.1.0"]


TRAIN = [
    "--max-steps=2",
    "--batch-size=2",
    "--grad-accum=1",
    "--rank=2",
    "--seq-len=256",
    "--warmup=0",
    "--backend=torch",
]


def test_a_run_in_a_pipe_prints_plain_lines_and_quiet_prints_nothing(tmp_path, corpus_dir, model_dirs):
    words = ["train", *TRAIN, "--data-dir", str(corpus_dir), "--model", str(model_dirs["gpt2"]), "--tokenizer=hf"]
    loud = _run(*words, "--output-dir", str(tmp_path / "loud"))
    assert loud.returncode == 0, loud.stderr
    assert "torch_lora on cpu in float32" in loud.stdout
    assert "step 1/2" in loud.stdout
    assert "step 2/2" in loud.stdout
    assert str(tmp_path / "loud" / "adapter_model.safetensors") in loud.stdout
    assert "\x1b" not in loud.stdout
    quiet = _run(*words, "--quiet", "--output-dir", str(tmp_path / "quiet"))
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_preset_gives_way_to_flags(tmp_path, corpus_dir, model_dirs):
    words = ["train", "--preset=tiny", *TRAIN, "--data-dir", str(corpus_dir), "--model", str(model_dirs["gpt2"])]
    assert main([*words, "--quiet", "--output-dir", str(tmp_path / "run")]) == 0
    contract = json.loads((tmp_path / "run" / "training_manifest.json").read_text())["plan"]["contract"]
    assert (contract["rank"], contract["alpha"], contract["seq_len"]) == (2, 8.0, 256)


def test_patterns_are_flags_and_lines_of_a_file_and_the_plan_shows_them(tmp_path, corpus_dir, model_dirs, capsys):
    words = [
        "plan",
        "--data-dir",
        str(corpus_dir),
        "--model",
        str(model_dirs["gpt2"]),
        "--output-dir",
        str(tmp_path / "r"),
    ]
    assert main([*words, "--rank-pattern", "c_attn=2,mlp.c_proj=4", "--alpha-pattern", r"h\.0\..*=3.5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "ranks c_attn 2, mlp.c_proj 4" in shown
    assert r"alphas h\.0\..* 3.5" in shown
    file = tmp_path / "run.yaml"
    file.write_text(
        "adapter:\n  rank_pattern:\n    c_attn: 2\n    mlp.c_proj: 4\n  alpha_pattern: {'h\\.0\\..*': 3.5}\n"
    )
    assert main([*words, "--config", str(file), "--json"]) == 0
    contract = json.loads(capsys.readouterr().out)["contract"]
    assert list(contract["rank_pattern"].items()) == [("c_attn", 2), ("mlp.c_proj", 4)]
    assert contract["alpha_pattern"] == {r"h\.0\..*": 3.5}


def test_init_model_writes_a_folder_that_transformers_opens_and_the_seed_decides(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        words = ["init-model", "--arch", "qwen3", "--text", str(text), "--seed", seed, "--output", str(tmp_path / name)]
        assert main(words) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("the lazy fox", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "the lazy fox"
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)


def test_init_model_leaves_a_folder_in_use_alone(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("x")
    assert main(["init-model", "--arch", "gpt2", "--output", str(tmp_path / "model")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def _plan_words(corpus_dir, model_dirs, tmp_path):
    return ["--data-dir", str(corpus_dir), "--model", str(model_dirs["llama"]), "--output-dir", str(tmp_path / "run")]


def test_plan_prints_what_would_be_done_and_writes_nothing(tmp_path, corpus_dir, model_dirs, capsys):
    assert main(["plan", *_plan_words(corpus_dir, model_dirs, tmp_path), "--backend=jax"]) == 0
    text = capsys.readouterr().out
    for word in ("jax_lora on cpu in float32", "llama", "parameters", "steps of", "memory", "time", "digest"):
        assert word in text
    assert "torch_lora backend jax is asked for" in " ".join(text.split())
    assert list(tmp_path.iterdir()) == []


def test_plan_as_json_is_the_plan_of_the_library(tmp_path, corpus_dir, model_dirs, capsys):
    words = _plan_words(corpus_dir, model_dirs, tmp_path)
    assert main(["plan", *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    plan = mens_core.Planner().plan(model=words[3], data_dir=words[1], output_dir=words[5]).as_dict()
    flags = {name: origin.replace("call", "flag") for name, origin in plan["origins"].items()}
    assert printed == plan | {"origins": flags}


def test_plan_compares_every_kernel_and_explains_every_value(tmp_path, corpus_dir, model_dirs, capsys):
    (tmp_path / "run.yaml").write_text("rank: 5\npreset: safe\n")
    words = _plan_words(corpus_dir, model_dirs, tmp_path)
    config = ["--config", str(tmp_path / "run.yaml"), "--alpha=3"]
    assert main(["plan", *words, *config, "--compare", "--explain"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert all(any(line.startswith(f"{kernel} cpu float32") for line in lines) for kernel in KERNELS)
    assert f"rank 5 file {tmp_path / 'run.yaml'}" in lines
    assert "seq_len 256 preset safe" in lines
    assert "alpha 3 flag" in lines
    assert "seed 42 default" in lines
    assert "backend torch planner" in lines


def test_a_plan_of_a_run_that_would_be_refused_ends_with_code_2_and_says_why(tmp_path, corpus_dir, model_dirs, capsys):
    folder = tmp_path / "m"
    shutil.copytree(model_dirs["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    words = ["plan", "--data-dir", str(corpus_dir), "--model", str(folder), "--output-dir", str(tmp_path / "run")]
    assert main(words) == 2
    assert "[tensors_present] not so" in capsys.readouterr().out


def test_doctor_says_what_can_run_here(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: kernel["ready"] for name, kernel in found["kernels"].items()} == dict.fromkeys(KERNELS, True)
    assert found["memory_bytes"] > 1 << 30
    assert found["packages"]["mens-core"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch_qlora", "ready", "MENS_TRACE_HOOKS", found["processor"]))


def test_presets_are_listed_with_what_they_set(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["preset", "rank", "alpha"]
    assert any(line.split()[:4] == ["4080", "16", "32", "384"] for line in lines)
    assert main(["presets", "--list"]) == 0
    assert set(capsys.readouterr().out.split()) >= {"tiny", "safe", "4080", "default", "a100", "mobile_edge"}


def _text(name, text):
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def _link(name, target):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def _index(weight_map):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_text("config.json", "{"), "config.json"),
        (_text("config.json", b"\xff\xfe"), "config.json"),
        (_text("config.json", "[" * 100_000), "config.json"),
        (_text("config.json", '{"model_type": "llama", "hidden_size": -3}'), "hidden_size"),
        (_text("config.json", '{"model_type": "llama"}'), "vocab_size"),
        (_text("model.safetensors", b"\0" * 5), "model.safetensors"),
        (_text("model.safetensors", b"\xff" * 64), "model.safetensors"),
        (_text("model.safetensors", b"\x08\0\0\0\0\0\0\0" + b"[[[[[[[["), "model.safetensors"),
        (_text("tokenizer.json", "{}"), "tokenizer.json"),
        (_text("tokenizer_config.json", "{"), "tokenizer_config.json"),
        (_link("model.safetensors", "/etc/hostname"), "out of the model folder"),
        (_link("config.json", "config.json"), "config.json"),
        (_link("config.json", "/dev/zero"), "config.json"),
        (_link("tokenizer.json", "/etc/hostname"), "out of the model folder"),
        (_index({"a": "../model.safetensors"}), "shard index"),
        (_index({"a": "/etc/passwd"}), "shard index"),
        (_index({"a": "model.safetensors.index.json"}), "shard index"),
        (_index({"a": "none.safetensors"}), "none.safetensors"),
    ],
)
def test_a_model_folder_that_lies_is_refused_in_one_clear_error(
    change, named, tmp_path, corpus_dir, model_dirs, capsys
):
    folder = tmp_path / "m"
    shutil.copytree(model_dirs["llama"], folder)
    change(folder)
    words = ["--data-dir", str(corpus_dir), "--model", str(folder), "--output-dir", str(tmp_path / "run")]
    for verb in ("plan", "train"):
        assert main([verb, *words]) == 2
        printed = capsys.readouterr().err
        assert named in printed
        assert printed.count("error:") == 1
        assert "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_generate_heeds_every_flag_it_shows(model_dirs, tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(model_dirs["llama"], folder)
    words = ["generate", "--prompt", "Write x.", "--max-new-tokens=3", "--backend=torch", "--model", str(folder)]
    assert main(words) == 0
    plain = capsys.readouterr().out
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    assert main([*words, "--tokenizer-json", str(tmp_path / "elsewhere.json"), "--scan-weights"]) == 0
    assert capsys.readouterr().out == plain
    assert main([*words, "--tokenizer-json", str(tmp_path / "elsewhere.json"), "--kernel=jax_lora"]) == 2
    assert "forced_kernel_agrees" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"")
    assert main([*words, "--tokenizer-json", str(tmp_path / "elsewhere.json")]) == 2
    assert "model.safetensors" in capsys.readouterr().err
