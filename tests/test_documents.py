"""What README.md and the launchers say of flags is what the scripts parse."""

import importlib
import re

import pytest
from harness import ROOT

from dreambooth.command_line.colossalai_flags import ColossalAIFlags
from dreambooth.command_line.flags import Flags
from dreambooth.command_line.inference_flags import inference_parser
from dreambooth.command_line.parser import build_parser, read
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION

SCRIPTS = ("train_dreambooth_colossalai.py", "train_dreambooth.py", "inference.py")
FLAG = re.compile(r"(?<![\w-])(--?[a-z][\w-]*)")


def parser_of(script: str):
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "inference.py":
        return inference_parser(module.__doc__)
    return build_parser(getattr(module, "ColossalAIFlags", Flags), module.__doc__)


@pytest.fixture(scope="module")
def options():
    """The flags of each script."""
    return {script: set(parser_of(script)._option_string_actions) for script in SCRIPTS}


def commands(document: str) -> list[tuple[str, str]]:
    """Returns (script, the words after it) of every command in a document or docstring."""
    text = (ROOT / document).read_text().replace("\\\n", " ")
    script = re.compile(rf"^[^`|#\n]*?\b({'|'.join(map(re.escape, SCRIPTS))})\s+([^|\n]*--[^|\n]*)$", re.MULTILINE)
    return [(match[1], match[2]) for match in script.finditer(text)]


@pytest.mark.parametrize("document", ["README.md", *SCRIPTS])
def test_flags_of_commands_are_parsed(document, options):
    found = commands(document)
    assert found, f"no command found in {document}"
    for script, words in found:
        used = {flag for flag in FLAG.findall(re.sub(r'"[^"]*"', "", words)) if flag != "-"}
        assert used - {"--help"} <= options[script], (script, words)


def test_readme_installs_each_list_as_its_first_line_says():
    """Today's is complete, and pip would not resolve it: ColossalAI asks for other libraries."""
    for path, command in (
        ("requirements.txt", "pip install --no-deps -r requirements.txt"),
        ("requirements/cuda12.txt", "pip install -r requirements/cuda12.txt"),
    ):
        assert (ROOT / path).read_text().startswith(f"# {command}\n")
        assert f"`{command}`" in (ROOT / "README.md").read_text()


def test_flags_of_the_launchers_are_parsed(options):
    def flags(text: str) -> set[str]:
        return set(re.findall(r"(?<=[\s(])--[a-z]\w*", text))

    text = (ROOT / "dreambooth" / "launch.sh").read_text()
    of_inference = re.compile(r"^ *(?:sampling|trained)=.*$", re.MULTILINE)
    training, inference = of_inference.sub("", text).split('python "$project/inference.py"')
    used = flags(inference + "".join(of_inference.findall(text)))
    assert {"--compare_with", "--num_inference_steps", "--lora"} <= used <= options["inference.py"]
    trainers = options[SCRIPTS[0]] & options[SCRIPTS[1]]
    used = flags(training) - {"--list", "--standalone", "--nproc_per_node"}
    assert {"--instance_data_dir", "--resolution"} <= used <= trainers
    for launcher in ("colossalai.sh", "dreambooth.sh"):
        assert flags((ROOT / launcher).read_text()) <= options[SCRIPTS[0]]


def test_readme_names_every_flag_and_no_other(options):
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Flags") : text.index("## How it compares")]
    named = set(re.findall(r"`(--?[a-z][\w-]*)", table))
    assert named == (options[SCRIPTS[0]] | options[SCRIPTS[1]]) - {"-h", "--help"}


def test_shared_flags_have_the_same_default(options):
    first, second = parser_of(SCRIPTS[0]), parser_of(SCRIPTS[1])
    shared = options[SCRIPTS[0]] & options[SCRIPTS[1]]
    assert len(shared) > 35
    for option in shared:
        one, other = first._option_string_actions[option], second._option_string_actions[option]
        assert (one.default, one.required, one.choices) == (other.default, other.required, other.choices), option


def test_help_gives_every_default():
    for script in SCRIPTS[:2]:
        for action in parser_of(script)._actions:
            text = action.help or ""
            assert action.required or "default" in text or action.dest == "help", action.dest
            if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
                stated = float(re.search(r"\(default: ([\d.e-]+)", text)[1])
                assert stated == action.default, action.dest


def test_defaults_of_the_public_example():
    flags = read(ColossalAIFlags, ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d"])
    found = {name: value for group in flags.groups() for name, value in vars(group).items()}
    expected = dict(
        prior_loss_weight=1.0,
        num_class_images=100,
        train_batch_size=4,
        sample_batch_size=4,
        num_train_epochs=1,
        save_steps=500,
        learning_rate=5e-6,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        max_grad_norm=1.0,
        adam_weight_decay=1e-2,
        test_run=False,
        placement="cuda",
        plugin=None,
    )
    assert {name: found[name] for name in expected} == expected
    assert found["resolution"] is None and STABLE_DIFFUSION.resolution == 512
