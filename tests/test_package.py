"""The package as a user meets it: imports, the wheel's contents, commands that answer at once."""

import os
import resource
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import datasetdm_fast
from datasetdm_fast import _C, cli

ROOT = Path(__file__).parents[1]
MAPPED = {"kernels": "datasetdm_fast/kernels", "export": "datasetdm_fast/export", "datasetdm_fast": "datasetdm_fast"}


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=900, **options)


@pytest.mark.parametrize("folder", ["kernels", "export"])
def test_a_bare_import_of_a_source_folder_is_refused_in_one_sentence(folder):
    result = python("-c", f"import {folder}", cwd=ROOT)
    assert result.returncode == 1
    assert f"ImportError: '{folder}' is a source folder" in result.stderr.splitlines()[-1]
    assert f"import datasetdm_fast.{folder} instead" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("folder", ["kernels", "export"])
def test_the_mapped_folders_are_sub_packages(folder):
    module = import_module(f"datasetdm_fast.{folder}")
    assert module.__doc__ and Path(module.__file__).samefile(ROOT / folder / "__init__.py")


def test_importing_the_package_loads_no_torch_and_the_names_are_there_on_demand():
    result = python(
        "-c",
        "import sys, datasetdm_fast; print('torch' in sys.modules, 'numpy' in sys.modules); datasetdm_fast.nothing",
    )
    assert result.stdout == "False False\n"
    assert "AttributeError: module 'datasetdm_fast' has no attribute 'nothing'" in result.stderr
    assert callable(datasetdm_fast.Pipeline) and callable(datasetdm_fast.open_run)


def commands():
    yield "datasetdm_fast", "--help"
    yield "datasetdm_fast", "--version"
    for module, _ in cli.COMMANDS.values():
        yield module, "--help"
        yield module, "--version"


@pytest.mark.parametrize(("module", "flag"), list(commands()))
def test_help_and_version_answer_at_once(module, flag):
    def seconds():
        """Processor seconds of one run: unlike the clock, they do not grow with what else the machine is doing."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = python("-X", "importtime", "-m", module, flag)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result.returncode == 0
        assert (
            (datasetdm_fast.__version__ in result.stdout) if flag == "--version" else result.stdout.startswith("usage:")
        )
        loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert "datasetdm_fast" in loaded and not loaded & {"torch", "diffusers", "transformers", "yaml"}
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(2)) < 1


def test_an_unknown_command_is_refused_in_two_lines(capsys):
    assert cli.main(["generat"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[0] == "datasetdm-fast: unknown command 'generat' (did you mean generate?)"
    )
    assert cli.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert cli.main(["generate", "--sede", "1"]) == 2
    assert "did you mean --seed?" in capsys.readouterr().err


def test_the_extension_needs_no_cuda_library_to_be_imported():
    assert _C.cuda_device_count() >= 0
    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked and "not found" not in linked


def sources(root):
    """Where every file of the package folders is to be installed."""
    for folder, installed in MAPPED.items():
        for file in (root / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
                yield f"{installed}/{file.relative_to(root / folder).as_posix()}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("csrc", *MAPPED, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-build-isolation",
        "--no-deps",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "-w",
        "dist",
    ]
    result = python(*command, cwd=copy, env={**os.environ, "DATASETDM_CUDA": "0"})
    assert result.returncode == 0, result.stderr
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        entry_points = next(
            archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt")
        )
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    compiled = {name for name in held if name.startswith("datasetdm_fast/_C.") and name.endswith(".so")}
    assert held - compiled == set(sources(wheel.parents[1]))
    assert len(compiled) == 1 and "datasetdm_fast/py.typed" in held and len(licences) == 1
    assert "datasetdm-fast = datasetdm_fast.cli:main" in entry_points


def test_the_installed_wheel_runs(wheel, tmp_path):
    target = tmp_path / "site"
    result = python(
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        str(target),
        str(wheel),
    )
    assert result.returncode == 0, result.stderr
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(target)}}
    paths = python(
        "-c",
        "import datasetdm_fast, datasetdm_fast.kernels as k, datasetdm_fast.export as e, datasetdm_fast._C as c; "
        "print(k.__file__, e.__file__, c.__file__)",
        **options,
    )
    assert paths.returncode == 0, paths.stderr
    assert all(Path(path).is_relative_to(target) for path in paths.stdout.split())
    assert (
        python("-m", "datasetdm_fast.generate", "--version", **options).stdout
        == f"datasetdm-fast {datasetdm_fast.__version__}\n"
    )
    script = subprocess.run(
        [target / "bin/datasetdm-fast", "generate", "--version"], capture_output=True, text=True, **options
    )
    assert (script.returncode, script.stdout) == (0, f"datasetdm-fast {datasetdm_fast.__version__}\n"), script.stderr
