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
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted(path.name for path in (ROOT / "model_cards").glob("*.md"))


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = (line.partition("==") for line in lines)
    return {canonicalize_name(name): version for name, _, version in pins}


ACCELERATE_CONFIGS = {
    "cpu": (DistributedType.NO, 1),
    "one_gpu": (DistributedType.NO, 1),
    "multi_gpu_ddp": (DistributedType.MULTI_GPU, 8),
    "fsdp2": (DistributedType.FSDP, 8),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 8),
    "two_machines_fsdp2": (DistributedType.FSDP, 16),
}


@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_accelerate_configuration_loads(name):
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == ACCELERATE_CONFIGS[name]
    assert config.use_cpu == (name == "cpu") and config.mixed_precision == ("no" if name == "cpu" else "bf16")
    assert config.num_machines == (2 if name.startswith("two_machines") else 1)
    if name.endswith("fsdp2"):
        assert config.fsdp_config["fsdp_version"] == 2
        # It would fail on the model's buffers: https://github.com/huggingface/accelerate/issues/3898
        assert not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_every_accelerate_configuration_is_known_and_says_what_it_is_for():
    files = (ROOT / "recipes" / "accelerate_configs").glob("*.yaml")
    first_lines = {path.stem: path.read_text(encoding="utf-8").splitlines()[0] for path in files}
    assert first_lines.keys() == ACCELERATE_CONFIGS.keys()
    assert all(line.startswith("# ") for line in first_lines.values())


def test_one_process_sees_one_gpu():
    config = str(ROOT / "recipes" / "accelerate_configs" / "one_gpu.yaml")
    for words, gpu in (([], "0"), (["--gpu_ids", "1"], "1")):
        words = ["--config_file", config, *words, "recipes/pipeline.py"]
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        _, environment = prepare_simple_launcher_cmd_env(args)
        assert environment["CUDA_VISIBLE_DEVICES"] == gpu and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_both_machines_are_launched_with_eight_processes_each():
    config = str(ROOT / "recipes" / "accelerate_configs" / "two_machines_fsdp2.yaml")
    words = ["--config_file", config, "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "recipes/pipeline.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(args)
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", 1)
    assert args.rdzv_endpoint == "10.0.0.1:29500"
    assert environment["FSDP_VERSION"] == "2" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


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
