"""The configuration: precedence, types, errors that name file, line, key and value."""

import pytest
import yaml

from config import ALIASES, KEYS, REFUSED
from errors import ROOT, UsageError, no_file, no_folder, path_hint
from settings.reader import load_config, to_yaml
from settings.reference import reference_page
from training.start import configure
from trainSpeakerNet import main

BASE = ["--model", "ResNetSE34L", "--trainfunc", "aamsoftmax"]


def error_of(arguments):
    with pytest.raises(UsageError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_command_line_beats_yaml_beats_default_and_says_so_once(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# mine\nmodel: ResNetSE34L\ntrainfunc: aamsoftmax\nlr: 0.5\nbatch_size: 7\n")
    config, _, notes, _ = load_config(["--config", str(path), "--lr", "0.25"])
    assert (config.lr, config.batch_size, config.max_frames) == (0.25, 7, 200)
    assert notes == [f"lr: 0.25 (command line) overrides 0.5 ({path}:4)"]


@pytest.mark.parametrize(
    "words, value",
    [
        (["--mixedprec"], True),
        (["--no-mixedprec"], False),
        (["--mixedprec", "true"], True),
        (["--mixedprec", "False"], False),
        (["--mixedprec=no"], False),
    ],
)
def test_booleans(words, value):
    assert load_config(BASE + words)[0].mixedprec is value


def test_yaml_habits(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfmodel: ResNetSE34L\r\ntrainfunc: aamsoftmax\r\nlr: 5e-5\r\nport: 8888\r\naugment: True\r\n"
        b"musan_path:\r\nrir_path: ''\r\nmax_epoch: 1e2\r\nscale: 30\r\n"
    )
    config = load_config(["--config", str(path)])[0]
    assert (config.lr, config.port, config.augment, config.musan_path) == (5e-5, "8888", True, "")
    assert config.max_epoch == 100 and type(config.max_epoch) is int and type(config.scale) is float


@pytest.mark.parametrize("old, new", ALIASES.items())
def test_each_alias_is_read_with_one_warning(tmp_path, old, new):
    path = tmp_path / "x.yaml"
    value = {str: "softmax", int: 3, bool: True}[KEYS[new].type]
    keys = {"model": "ResNetSE34L", "trainfunc": "softmax", old: value}
    keys = {k: v for k, v in keys.items() if k != new}
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    config, _, notes, _ = load_config(["--config", str(path)])
    assert getattr(config, new) == value
    assert len(notes) == 1 and f"'{old}' is an old name, read as '{new}'" in notes[0] and f"{path}:" in notes[0]


def test_keys_of_the_fork_that_change_nothing_are_taken(tmp_path):
    path = tmp_path / "x.yaml"
    keys = "test_step: 2\ntest_interval: 2\nsave_every_epoch: false\nloss: softmax\ntrainfunc: softmax\n"
    path.write_text(f"model: ResNetSE34L\n{keys}")
    config = load_config(["--config", str(path)])[0]
    assert config.test_interval == 2 and config.trainfunc == "softmax" and not hasattr(config, "save_every_epoch")


@pytest.mark.parametrize(
    "line, message",
    [
        ("nClases: 10", "unknown key 'nClases' - did you mean 'nClasses'?"),
        ("nLcases: 10", "unknown key 'nLcases' - did you mean 'nClasses'?"),
        ("num_levels: 5", "unknown key 'num_levels'"),
        ("lr: abc", "lr: expected a number, got 'abc'"),
        ("lr: -1", "lr: must be above 0, got -1.0"),
        ("lr: .nan", "lr: must be a finite number"),
        ("lr:", "lr: has no value"),
        ("batch_size: 2.5", "batch_size: expected a whole number, got '2.5'"),
        ("batch_size: true", "batch_size: expected a whole number"),
        ("augment: 2", "augment: expected true or false, got '2'"),
        ("amp_dtype: fp16", "amp_dtype: must be one of auto, float16, bfloat16"),
        ("optimizer: admaw", "no plug-in 'optimizer/admaw.py' - did you mean 'adamw'?"),
        ("trainfunc: softmax", "duplicate key 'trainfunc', first given at"),
        ("loss: softmax", "'loss' and 'trainfunc' are the same key"),
        ("score_save_epoch: 1", "'score_save_epoch' is not supported"),
        ("lr: [", "not valid YAML"),
    ],
)
def test_errors_name_file_line_and_key(tmp_path, line, message):
    path = tmp_path / "x.yaml"
    path.write_text(f"model: ResNetSE34L\ntrainfunc: aamsoftmax\n{line}\n")
    error = error_of(["--config", str(path)])
    assert message in error
    assert error.startswith((f"{path}:3:", f"{path}:4:"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--max_ep", "3"], "unknown key '--max_ep'"),
        (["--nothing", "3"], "unknown key '--nothing'"),
        (["stray"], "unexpected argument 'stray'"),
        (["x.yaml"], "unexpected argument 'x.yaml'; a configuration is given by --config FILE"),
        (["--lr", "x"], "command line: --lr: expected a number, got 'x'"),
        (["--config", "/no/such.yaml"], "/no/such.yaml: cannot read"),
        (
            ["--channels", "8"],
            "unknown key '--channels' - a key of models/ECAPA_TDNN.py, which is not chosen",
        ),  # ECAPA_TDNN's, not ResNetSE34L's
    ],
)
def test_command_line_errors(words, message):
    assert message in error_of(BASE + words)


def test_a_misspelt_key_is_named_before_the_missing_model():
    assert "unknown key '--modle' - did you mean '--model'?" in error_of(["--modle", "x"])


def test_who_gives_no_model_is_told_of_the_configuration():
    assert "model: is not set by --config FILE; choose one of CAMPPlus, " in error_of(BASE[2:])


def test_a_path_of_the_checkout_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = f"; it is in '{ROOT}': run the command there, or give the whole path"
    assert error_of(["--config", "configs/demo.yaml"]).endswith(f": No such file or directory{there}")
    assert no_file("configs/demo.yaml") == f"no such file: 'configs/demo.yaml'{there}"
    assert no_folder("configs") == f"no such folder: 'configs'{there}"
    (tmp_path / "configs").mkdir()
    assert no_folder("configs") == path_hint("configs/none.yaml") == path_hint("") == ""


def test_a_misspelt_path_is_told_from_the_right_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_best.model").touch()
    (tmp_path / "people").mkdir()
    assert no_file("model_bst.model") == "no such file: 'model_bst.model' - did you mean 'model_best.model'?"
    assert no_folder(tmp_path / "peple").endswith(f"/peple' - did you mean '{tmp_path / 'people'}'?")
    assert error_of(["--config", "model_best.mdel"]).endswith("directory - did you mean 'model_best.model'?")
    (tmp_path / "people" / "1.wav").touch()
    assert path_hint("peple/1.wav") == " - did you mean 'people/1.wav'?"
    assert path_hint("people/2.wav") == path_hint("other.txt") == path_hint("none/model_best.model") == ""


def test_all_mistakes_of_a_configuration_are_said_at_once(settings, write, data, tmp_path, capsys):
    keys = {**settings, "lr": "fast", "nClases": 3, "optimizer": "admaw", "channels": "many"}
    yaml = write({**keys, "loss": "softmax", "save_every_epoch": True})
    assert main(["--config", yaml, "--n_mels", "0", "stray"]) == 2
    out, lines = capsys.readouterr()
    said = [line.split(": ", 1)[1] if line.startswith(yaml) else line for line in lines.splitlines()]
    assert not out and sorted(said) == sorted(
        [
            "command line: unexpected argument 'stray'; a configuration is given by --config FILE",
            "command line: --n_mels: must be at least 1, got 0",
            "'loss' and 'trainfunc' are the same key; give it once",
            f"'save_every_epoch' is not supported: {REFUSED['save_every_epoch']}",
            "lr: expected a number, got 'fast'",
            "unknown key 'nClases' - did you mean 'nClasses'?",
            "channels: expected a whole number, got 'many'",
            "optimizer: no plug-in 'optimizer/admaw.py' - did you mean 'adamw'?",
        ]
    )


def test_all_mistakes_of_paths_and_lists_are_said_at_once(settings, write, tmp_path, capsys):
    trials = tmp_path / "trials.txt"
    trials.write_text("1 a\n")
    keys = {"train_path": "/no/such", "test_list": str(trials), "save_path": str(trials), "margin": 5}
    yaml = write({**settings, **keys, "initial_model": "/no/such.model"})
    assert main(["--config", yaml]) == 2
    out, lines = capsys.readouterr()
    said = [line.split(": ")[1:3] for line in lines.splitlines()]
    assert not out and said[0] == ["save_path", f"'{trials}' is not a folder"] and len(said) == 5
    assert lines.splitlines()[1].startswith(f"{trials}:1: expected 'label pathA pathB', got 2")
    assert said[2:4] == [["initial_model", "no such file"], ["train_path", "no such folder"]] and said[4][0] == "margin"
    assert main(["--config", yaml, "--initial_model", str(tmp_path), "--test_list", str(tmp_path)]) == 2
    lines = capsys.readouterr().err
    assert lines.count(f": a folder, and not a file: '{tmp_path}'") == 2 and "utt2spk" not in lines
    yaml = write({**settings, "augment": True, "musan_path": "/no/noise", "rir_path": str(trials)})
    assert main(["--config", yaml]) == 2
    said = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["musan_path: no such folder: '/no/noise'", f"rir_path: a file, and not a folder: '{trials}'"]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"margin": 5}, "--margin: 5: loss 'aamsoftmax' (trainfunc) takes a margin from 0 to 1.5; 0.1 to 0.5 is usual"),
        ({"margin": -0.2}, "--margin: -0.2: loss 'aamsoftmax' (trainfunc) takes a margin from 0 to 1.5"),
        ({"trainfunc": "amsoftmax", "margin": 1.2}, "takes a margin from 0 to 1;"),
        ({"trainfunc": "angleproto", "nPerSpeaker": 6}, "6 utterances a row, more than any speaker of "),
        (
            {"trainfunc": "angleproto", "nPerSpeaker": 3, "max_seg_per_spk": 2},
            "--nPerSpeaker: 3 utterances a row, more than max_seg_per_spk allows (2)",
        ),
    ],
)
def test_values_that_no_training_can_use_are_refused(settings, keys, message):
    with pytest.raises(UsageError) as caught:
        configure([f"--{key}={value}" for key, value in {**settings, **keys}.items()])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_plugin_keyword_arguments_are_legal_keys_of_their_type(tmp_path):
    words = [
        "--model",
        "ECAPA_TDNN",
        "--trainfunc",
        "aamsoftmax",
        "--channels",
        "64",
        "--easy_margin",
        "--optimizer",
        "sgd",
    ]
    config = load_config(words + ["--momentum", "5e-1"])[0]
    assert (config.channels, config.easy_margin, config.momentum) == (64, True, 0.5)
    assert "expected a whole number" in error_of(words + ["--channels", "many"])


def test_unknown_keys_of_old_files_can_be_ignored(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: ResNetSE34L\ntrainfunc: aamsoftmax\nfusion_type: sum\nallow_unknown: true\n")
    notes = load_config(["--config", str(path)])[2]
    assert notes == [f"{path}:3: 'fusion_type' is unknown and ignored (allow_unknown)"]


def test_a_key_that_nothing_uses_is_said(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: ResNetSE34L\ntrainfunc: softmax\nhard_rank: 5\n")
    assert any(
        "hard_rank" in note and "none of the chosen plug-ins" in note
        for note in load_config(["--config", str(path)])[2]
    )


def test_print_config_reads_back(tmp_path):
    config = load_config(BASE + ["--lr", "5e-5"])[0]
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml({**config.values(), "config": ""}))
    assert load_config(["--config", str(path)])[0].values() == {**config.values(), "config": str(path)}


def test_every_key_has_a_meaning_and_the_reference_page_is_current(tools):
    assert all(key.help and key.group for key in KEYS.values())
    assert not set(KEYS) & (set(ALIASES) | set(REFUSED))
    page = (tools.root / "docs" / "configuration.md").read_text()
    assert page == reference_page() + "\n", "run: make docs"


KEYS_OF_THE_FORK = """
config max_frames eval_frames batch_size max_seg_per_spk nDataLoaderThread augment seed
test_interval max_epoch trainfunc patience optimizer scheduler lr lr_decay weight_decay hard_prob hard_rank margin scale
nPerSpeaker nClasses dcf_p_target dcf_c_miss dcf_c_fa initial_model save_path train_list test_list train_path test_path
musan_path rir_path n_mels log_input model encoder_type nOut sinc_stride eval port distributed mixedprec max_test_pairs
prefetch_factor persistent_workers gradient_accumulation_steps enable_profiling compile_model eval_batch_size gpu_id
pin_memory""".split()


def test_every_key_of_the_fork_is_known():
    assert set(KEYS_OF_THE_FORK) <= set(KEYS)


@pytest.mark.parametrize("name", sorted(p.stem for p in __import__("pathlib").Path("configs").glob("*.yaml")))
def test_shipped_configurations_are_valid(name):
    config, _, notes, _ = load_config(["--config", f"configs/{name}.yaml"])
    assert not notes and not config.save_path.startswith("/")


def test_another_model_on_the_command_line_passes_over_the_keys_of_the_one_it_replaces(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: ECAPA_TDNN\nchannels: 8\ntrainfunc: aamsoftmax\neasy_margin: true\n")
    config, _, notes, _ = load_config(["--config", str(path), "--model", "ResNetSE34L"])
    assert config.model == "ResNetSE34L" and not hasattr(config, "channels") and config.easy_margin is True
    assert f"{path}:2: 'channels' is ignored: it belongs to the plug-in that --model replaces" in "\n".join(notes)
    with pytest.raises(UsageError, match="unknown key '--channels'"):
        load_config(["--config", str(path), "--model", "ResNetSE34L", "--channels", "8"])
    path.write_text("model: ECAPA_TDNN\nchanels: 8\ntrainfunc: aamsoftmax\n")
    with pytest.raises(UsageError, match="unknown key 'chanels'"):
        load_config(["--config", str(path), "--model", "ResNetSE34L"])


@pytest.mark.parametrize(
    "written, meant",
    [("true", "same"), ("false", "none"), ("off", "none"), ("none", "none"), ("same", "same"), ("cpu", "cpu")],
)
def test_a_key_of_words_that_was_a_bool_once_understands_both(written, meant, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(f"model: ResNetSE34L\ntrainfunc: aamsoftmax\nnan_recheck: {written}\n")
    assert load_config(["--config", str(path)])[0].nan_recheck == meant
    assert load_config([*BASE, "--nan_recheck", written])[0].nan_recheck == meant


def test_the_flags_of_a_key_that_was_a_bool_once_go_on():
    assert load_config([*BASE, "--nan_recheck"])[0].nan_recheck == "same"
    assert load_config([*BASE, "--no-nan_recheck"])[0].nan_recheck == "none"
    assert "nan_recheck: must be one of none, same, cpu; got 'gpu'" in error_of([*BASE, "--nan_recheck", "gpu"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "exp_dir: exp\nmodel: ResNet34\nmodel_args:\n  feat_dim: 80\ndataset_args:\n  shuffle: True\n",
            "of wespeaker,",
        ),
        ("lr: 0.2\nfeature_extractor:\n  obj: F\nembedding_model:\n  obj: E\n", "of 3D-Speaker, whose keys are others"),
        (
            "name: T\nmodel:\n  loss: x\ntrainer:\n  devices: 1\nexp_manager:\n  name: a\n",
            "configs/ECAPA_TDNN_AAM.yaml",
        ),
        (
            "seed: 1\nfolder: !ref results/<seed>\n",
            "of SpeechBrain, whose keys are others; begin with configs/recipes/",
        ),
    ],
)
def test_a_configuration_of_another_toolkit_is_one_line(tmp_path, text, words):
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"^{path}: a configuration of ") as caught:
        load_config(["--config", str(path)])
    assert words in str(caught.value) and "\n" not in str(caught.value)
