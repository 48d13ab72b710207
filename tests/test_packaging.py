"""What a user installs and launches with: the wheel, the constraints, the accelerate configurations."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted(path.name for path in (ROOT / "model_cards").glob("*.md"))


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = (line.partition("==") for line in lines)
    return {canonicalize_name(name): version for name, _, version in pins}


@pytest.mark.parametrize(
    ("name", "distributed_type"),
    [
        ("cpu", DistributedType.NO),
        ("multi_gpu_ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_configuration_loads(name, distributed_type):
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml"))
    assert config.distributed_type == distributed_type
    assert config.use_cpu == (name == "cpu") and config.num_processes == (1 if name == "cpu" else 8)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files behind
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("onerec_hf", "model_cards", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as opened:
        yield opened


def test_wheel_carries_the_package_the_card_templates_and_the_recipes(wheel):
    names = wheel.namelist()
    assert TEMPLATES and all(f"onerec_hf/model_card_templates/{name}" in names for name in TEMPLATES)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "onerec_hf").rglob("*.py")}
    assert modules <= set(names)
    recipes = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "recipes").glob("*.py")]
    carried = {name for name in names if name.startswith("onerec_hf/recipes/")}
    assert carried == {f"onerec_hf/{path.relative_to(ROOT).as_posix()}" for path in recipes}
    assert not [name for name in names if name.startswith(("tests", "recipes", "model_cards"))]


def test_recipes_run_by_name_from_the_wheel(wheel, tmp_path):
    installed = tmp_path / "site-packages"
    wheel.extractall(installed)
    package, environment = installed / "onerec_hf", os.environ | {"PYTHONPATH": str(installed)}
    (distribution,) = distributions(name="onerec_hf", path=[str(installed)])
    (command,) = distribution.entry_points
    module, function = command.value.split(":")
    info = f"import sys; sys.argv.append('info'); import {module}; {module}.{function}()"
    # The base of this recipe lies in the folder above it.
    cpu = str(package / "recipes" / "accelerate_configs" / "cpu.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", cpu]
    pipeline = [*launch, "-m", "onerec_hf", "pipeline", "--config", "amazon_beauty", "--help"]
    for words, expected in (
        (["-c", info], [f", {package}\n", f"{package / 'recipes' / 'accelerate_configs'}: cpu.yaml, "]),
        (pipeline, ["usage: onerec pipeline"]),
    ):
        started = [sys.executable, *words]
        result = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        assert all(text in result.stdout for text in expected), result.stdout
    assert command.name == "onerec"


def test_constraints_pin_every_requirement_within_its_range():
    pins = constraints()
    try:
        requirements = [Requirement(line) for line in requires("onerec_hf")]
    except ModuleNotFoundError:
        pytest.skip("onerec_hf is not installed, only on the path")
    for requirement in requirements:
        version = pins[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} against {version} of constraints.txt"
    assert "+" not in "".join(pins.values()), "a local version fits one build only"


def test_what_the_plain_installation_lacks_is_not_imported():
    optional = ("duckdb", "gradio", "hypothesis", "optuna", "peft", "pytest", "starlette", "torchao", "uvicorn")
    code = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys({optional}))
        import onerec_hf.stages, onerec_hf.model_export
        for statement in ("onerec_hf.stages.recipe_arguments.lora_config({{'r': 2}})", "import onerec_hf.serving"):
            try:
                exec(statement)
            except ImportError as error:
                print(error)
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    messages = [message.partition(": ")[2] for message in result.stdout.splitlines()]
    assert messages == [f"pip install -c constraints.txt 'onerec_hf[{extra}]'." for extra in ("lora", "serve")]


@pytest.mark.parametrize(
    ("script", "install", "program", "started", "failure"),
    [
        (
            "recipes/quickstart/run.sh",
            "install -c constraints.txt -e .",
            ".venv/bin/accelerate",
            "launch --config_file recipes/accelerate_configs/cpu.yaml recipes/pipeline.py "
            "--config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart",
            "FAILED: the quickstart, see above; the same command resumes it",
        ),
        (
            "tests/run.sh",
            "install -c constraints.txt -e .[test]",
            ".venv/bin/python",
            "-m pytest",
            "FAILED: the tests, see above",
        ),
    ],
)
def test_scripts_install_and_run_from_the_root_and_say_what_failed(
    script, install, program, started, failure, tmp_path
):
    """With programs in place of the real ones, which write how they were called."""
    root, programs = tmp_path / "a clone", tmp_path / "programs"
    for name in (script, "recipes/install.sh"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)

    def write(path: Path, code: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{code}\n", encoding="utf-8")
        path.chmod(0o755)

    def run(status: int) -> list[str]:
        environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", str(root / script), "--seed", "two words"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == status, result.stderr
        return [*result.stdout.splitlines(), *result.stderr.splitlines()]

    called = 'echo "$PWD: $*"; for last; do :; done'
    for name in ("python3.11", "python3"):
        write(programs / name, f"{called}; exit 5")
    make = f"{root}: -m venv --clear .venv"
    assert run(5) == [make, make, "FAILED: creating .venv, which needs Python 3.11 or newer with venv"]
    write(root / ".venv/bin/pip", f"{called}; exit 4")
    assert run(4) == [f"{root}: {install}", "FAILED: installing, see pip above"]
    write(root / ".venv/bin/pip", called)
    write(root / program, f'{called}; [ "$last" != "two words" ] || exit 3')
    assert run(3) == [f"{root}: {install}", f"{root}: {started} --seed two words", failure]
    write(root / program, called)
    assert run(0)[1:] == [f"{root}: {started} --seed two words"]
