"""The command line: overrides reach the settings, and every mistake ends in one sentence and a non-zero exit code."""

import os
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import pytest
from ablations import VARIANTS
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

import trace_jax
from trace_jax.config import ConfigError
from trace_jax.main import COMMANDS, main, parse
from trace_jax.models.families import PUBLISHED
from trace_jax.run.experiment import load_config
from trace_jax.run.study import check_study
from trace_jax.unlearning.objectives import Objective

QUICKSTART = "configs/quickstart.py"
QUICK = ["--config", QUICKSTART, "--workdir", "w"]
OBJECTIVE = "--config.unlearning.objective"
TEXT = ["--config", "configs/huggingface.py", "--workdir", "w", "--config.data.forget=a", "--config.data.retain=b"]
STUDIES = ("handbook_study", "presidents_study", "dose_study", "objectives_study", "trainable_study")
NAMES = ("quickstart", "presidents", *STUDIES)
FILES = {f"patching_{model}": f"patching_study.py:{model}" for model in ("quickstart", "fine")}
FILES |= {
    "all_objectives": "objectives_study.py:all",
    **dict.fromkeys(VARIANTS, "ablations.py:{}"),
    **dict.fromkeys(PUBLISHED, "plan.py:{}"),
}


@pytest.mark.parametrize("name", [*NAMES, *FILES])
def test_every_config_resolves(name):
    config = load_config("configs/" + FILES.get(name, "{}.py").format(name))
    assert config.name == name
    assert not name.endswith("_study") or check_study(config)
    if name == "handbook_study":  # one budget, and alpha is bracketed
        methods = {"uniform", "uniform_2x", "trace", "permuted", "random_experts", "ngram", "oracle"}
        assert methods <= set(config.study.methods)
        assert len(config.study.seeds) >= 3 and len(config.study.alphas) >= 3


def test_a_checkpoint_is_exported_after_it_has_unlearned():
    config = load_config("configs/huggingface.py", {"data.forget": "a", "data.retain": "b", "model.path": "c"})
    assert config.export in config.methods and config.model.dtype == "bfloat16" and config.target is None
    assert load_config("configs/text.py", {"data.forget": "a", "data.retain": "b"}).data.retain == "b"


def test_what_comes_with_the_package_is_named_from_anywhere(tmp_path, monkeypatch, capsys):
    here = load_config("configs/quickstart.py:attacks")
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart:attacks") == load_config("configs/quickstart.py:attacks") == here
    assert main(["configs"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed["quickstart"].startswith("Unlearn one topic") and "published" not in listed


BAD = [
    (["stduy", "--config", QUICKSTART], "no command 'stduy'; did you mean 'study'?"),
    (["--config", "nowhere.py", "--workdir", "w"], "nowhere.py: no such config file"),
    (["--config", "quikstart", "--workdir", "w"], "no such config file; did you mean 'quickstart'? Give --config"),
    ([*QUICK, "--config.unlearning.stepz=3"], "did you mean 'steps'"),
    ([*QUICK, "--config.name.x=3"], "name is a single setting"),
    (["--config", f"{QUICKSTART}:big", "--workdir", "w"], "has the variant 'attacks'; got 'big'"),
    (["--config", "configs/text.py:big", "--workdir", "w"], "has no variants, and 'big' is given"),
    (["--config", "configs/plan.py:big", "--workdir", "w"], "has the variants olmoe-1b-7b, "),
    (["--config", "configs/wmdp_cyber.py:mixtral"], "has no model 'mixtral'; did you mean 'mixtral-8x7b'? "),
    (["--config", "configs/wmdp_cyber.py:mixtral-8x7b,rmo"], "has no method 'rmo'; did you mean 'rmu'? "),
    (["--config", "configs/muse_news.py:olmoe-1b-7b,npo,sust"], "has no kind 'sust'. A variant is MODEL or"),
    (["report", "--workdir", "w"], "w: there is no such directory; give the directory of a run"),
    (["report", "--workdir", "configs"], "configs: is no run (it has no config.json); give the directory of a run"),
    (["export", "--workdir", "w", "--output", "w"], "there is no such directory"),
    (["--config", QUICKSTART, "--workdir", "README.md/w"], "README.md/w: can't be written (Not a directory); choose"),
    ([*QUICK, "--config.unlearning.learning_rate=1e9"], "expected a value from 0.0 to 10000.0 (peak learning rate)"),
    ([*QUICK, "--config.unlearning.alpha=-1"], "alpha is -1.0; expected a value at least 0"),
    ([*QUICK, "--config.unlearning.steps=abc"], "steps is 'abc' (str); expected a whole number"),
    ([*QUICK, f"{OBJECTIVE}=npoo"], "objective is 'npoo'; expected one of"),
    ([*QUICK, "--config.data.benchmark=handbok"], "data is 'handbok'; expected one of"),
    ([*QUICK, "--config.methods=trace,tracce"], "methods is 'tracce'; expected one of"),
    (["verify", "--checkpoint", "w"], "is no directory"),
    ([*QUICK, f"{OBJECTIVE}=npo", f"{OBJECTIVE}.nll_ceiling=3.0"], "nll_ceiling would have no effect"),
    ([*QUICK, "--num-processes", "2"], "--coordinator HOST:PORT, --process-id I: missing"),
    ([*TEXT, "--config.model.path=w"], "is no directory. A model of the Hugging Face hub is downloaded first"),
]


UNUSABLE = {
    "forget.csv": ("text\nx", "is a table; huggingface:DIR names a directory of such files"),
    "forget.txt": ("%PDF-1.7", "is a PDF, not text; save its text in a .txt file"),
    "forget.json": ("[]", "expected JSON lines: one object per line, in a file that ends in .jsonl"),
    "forget.jsonl": ('{"prompt": "a", "completion": "b"}', "the keys are completion, prompt; expected"),
    "broken.jsonl": ('{"text": "a"}\n{"text', "broken.jsonl:2: not JSON"),
    "empty.jsonl": ("", "the file is empty; expected text, or one JSON object per line"),
    "retain.jsonl": ('{"text": "a"}', "1 of 1 forget documents also stand in retain"),
    "few.jsonl": ('{"text": "b"}', "retain: 1 documents, 1 of them unlike all others; at least 3 different documents"),
}


@pytest.mark.parametrize(("file", "content", "message"), [(name, *of) for name, of in UNUSABLE.items()], ids=UNUSABLE)
def test_text_that_can_not_be_used_ends_in_a_sentence(tmp_path, capsys, file, content, message):
    (tmp_path / "retain.jsonl").write_text('{"text": "a"}')
    (tmp_path / file).write_text(content)
    sources = (f"--config.data.{use}={tmp_path / name}" for use, name in (("forget", file), ("retain", "retain.jsonl")))
    assert main(["--config", "text", "--workdir", str(tmp_path / "w"), *sources]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "w").exists()


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_mistakes_end_in_a_sentence(tmp_path, capsys, arguments, message):
    arguments = [str(tmp_path / "w") if a == "w" else a for a in arguments]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


BROKEN = {
    "no get_config": ("x = 1", "wrong.py: has no get_config function"),
    "YAML": ("name: quickstart\nmethods: [uniform", "wrong.py:2: is not Python ('[' was never closed); --config takes"),
    "Markdown": ("# Title\n\nSome words.", "wrong.py:3: is not Python (invalid syntax); --config takes a Python file"),
    "an error in it": ("import math\nmath.nothing", "wrong.py:2: AttributeError: module 'math' has no attribute"),
    "an error in get_config": ("def get_config():\n    return {}['a']", "wrong.py:2: KeyError: 'a'"),
    "no settings": ("def get_config():\n    pass", "wrong.py: get_config returned None; expected a ConfigDict"),
    "a variant is needed": ("def get_config(variant):\n    pass", "wrong.py: needs a variant: FILE:variant"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_makes_no_experiment_is_answered_with_its_line(tmp_path, capsys, text, message):
    (tmp_path / "wrong.py").write_text(text + "\n")
    assert main(["--config", str(tmp_path / "wrong.py")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("spelling", ["{} --help", "help {}"])
def test_every_command_says_what_it_takes(command, spelling, capsys):
    with pytest.raises(SystemExit) as ended:
        main(spelling.format(command).split())
    out = capsys.readouterr().out
    assert ended.value.code == 0 and COMMANDS[command][1] in out.replace("\n", " ")
    assert ("--config FILE[:variant]" in out) == (command in ("run", "study", "series", "evaluate", "plan"))


def test_what_computes_nothing_needs_no_jax():
    for flag, expected in (
        ("help", "study "),
        ("configs", "quickstart "),
        ("--help", "doctor "),
        ("--version", trace_jax.__version__),
    ):
        program = f"import sys, trace_jax.main as m\ntry: m.main([{flag!r}])\nfinally: assert 'jax' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr


def test_a_run_imports_what_takes_long_when_it_needs_it():
    program = "import sys, trace_jax.run.methods; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"grain", "matplotlib", "nltk", "pandas", "scipy.stats"} & {*done.stdout.split()}


def test_a_missing_package_is_a_sentence():
    program = "import sys; sys.modules['ml_collections'] = None; from trace_jax.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "configs"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"trace_jax: the package ml_collections is not installed for {sys.executable}; activate"
    )
    assert f"{sys.executable} -m pip install " in done.stderr


@pytest.mark.parametrize(
    ("error", "several", "message"),
    [
        (JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes.\nand so on"), False, "9 bytes. ... The command `plan` says"),
        (JaxRuntimeError("UNKNOWN: Gloo: Connect timeout"), True, "Connect timeout ... Another process has ended"),
        (JaxRuntimeError("INTERNAL: nobody knows"), False, None),
        (RuntimeError("a mistake of ours"), True, None),
    ],
)
def test_of_errors_of_a_device_what_has_a_known_cause_ends_in_a_sentence(monkeypatch, capsys, error, several, message):
    def fail(_):
        raise error

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr("trace_jax.io.environment.main", fail)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: several)
    monkeypatch.setattr(os, "_exit", end)  # at once, where others wait
    if message is None:
        with pytest.raises(RuntimeError, match=str(error)):
            main(["doctor"])
        return
    if several:
        with pytest.raises(SystemExit, match="2"):
            main(["doctor"])
    else:
        assert main(["doctor"]) == 2
    assert message in capsys.readouterr().err


def test_output_that_nobody_reads_any_more_is_no_error():
    """A reader that has ended, as `head` does."""
    settings = subprocess.Popen([sys.executable, "-m", "trace_jax.main", "settings"], stdout=-1, stderr=-1, text=True)
    with settings:
        settings.stdout.close()
        said = settings.stderr.read()
    assert (settings.returncode, said) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_own_exit_code(monkeypatch, capsys, number, code):
    """Ctrl-C arrives as Python's own KeyboardInterrupt, unless a loop makes it wait."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr("trace_jax.io.environment.main", lambda _: signal.raise_signal(number))
    try:
        assert main(["doctor"]) == code
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert "the same command continues" in capsys.readouterr().err


def test_an_interruption_where_nothing_can_be_raised_comes_again(monkeypatch, capsys):
    class Held:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def work(_):
        Held()
        time.sleep(20)

    monkeypatch.setattr("trace_jax.io.environment.main", work)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["doctor"]) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "\ninterrupted; the same command continues where it stopped.\n"


def test_values_are_literals_or_text_and_an_unknown_argument_is_named(capsys):
    config = parse([*QUICK, "--config.methods=('uniform',)", "--config.name", "mine"]).load_config()
    assert (config.methods, config.name) == (("uniform",), "mine")
    for given in ("trace,ngram", "trace, ngram", "('trace', 'ngram')"):
        assert parse([*QUICK, f"--config.methods={given}"]).load_config().methods == ("trace", "ngram")
    config = parse([*QUICK, "--config.methods=trace", "--config.evaluation.levels=0.4", "--config.study.seeds=0,1"])
    config = config.load_config()
    assert (config.methods, config.evaluation.levels, config.study.seeds) == (("trace",), (0.4,), (0, 1))
    with pytest.raises(SystemExit):
        parse([*QUICK, "--learning_rate=3"])
    said = capsys.readouterr().err
    assert "unknown argument '--learning_rate=3'; did you mean --config.target.learning_rate=3 or --config.unl" in said


def test_doctor_reports_versions(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert trace_jax.__version__ in out and "ready." in out
    count = jax.device_count()
    assert "  commit  " in out and "  memory  " in out and "  Hugging Face token " in out and "  datasets  " in out
    assert f"{count} x cpu:cpu" in out and f"processes          1; a mesh has {count} devices\n" in out


@pytest.mark.parametrize("objective", Objective.kinds)
def test_the_quickstart_takes_any_objective(objective):
    config = load_config(QUICKSTART, {"unlearning.objective": objective}).unlearning
    assert config.objective.name == objective and config.learning_rate == 2e-3
    assert getattr(config.objective, "nll_ceiling", 0.0) == (5.0 if objective == "gradient_difference" else 0.0)


def test_what_the_file_sets_of_a_retain_term_goes_with_it(capsys):
    config = load_config("configs/presidents.py", {"unlearning.objective": "gradient_ascent"})
    assert not config.unlearning.retains
    assert "unlearning.alpha of the config file is left out" in capsys.readouterr().err


def test_a_run_without_a_workdir_goes_where_its_name_says(monkeypatch):
    prepare = mock.Mock(side_effect=ConfigError("no further"))
    monkeypatch.setattr("trace_jax.run.methods.prepare", prepare)
    assert main(["--config", QUICKSTART, "--config.name=mine"]) == 2 and prepare.call_args.args[1] == "runs/mine"


def test_settings_in_a_mapping_are_an_experiment_and_stay_as_they_are():
    given = {"name": "mine", "data": {"benchmark": "text", "forget": "a", "retain": "b"}}
    config = load_config(given, {"data.retain": "c", "unlearning.steps": 3})
    assert (config.data.retain, config.unlearning.steps) == ("c", 3) and given["data"]["retain"] == "b"
    assert load_config(ConfigDict(given)) == load_config(given)
    with pytest.raises(ConfigError, match="there is no setting of this name; did you mean 'steps'"):
        load_config({**given, "unlearning": {"stepz": 3}})
