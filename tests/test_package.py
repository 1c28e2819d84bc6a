"""The package as a user meets it: imports, the wheel's contents, commands that answer at once."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePath

import pytest
from lock import normal
from packaging.requirements import Requirement
from skips import long_test

import datasetdm_fast
from datasetdm_fast import _C, cli

ROOT = Path(__file__).parents[1]
LONG = "DATASETDM_LONG_TESTS" in os.environ
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


def test_the_image_installs_the_locked_libraries(tmp_path):
    """Its one make target builds the extension, and installs torch by itself and the rest by their digests."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (line,) = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN make")]
    words = shlex.split(
        line.replace("/opt/venv", str(tmp_path)).replace("$TORCH", "torch==2").replace("$PIP_FLAGS", "")
    )
    assert "ARG TORCH=torch==2.13.0" in lines and "TORCH ?= torch==2.13.0" in (ROOT / "Makefile").read_text()
    plan = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    assert "--no-cache-dir  torch==2\n" in plan.stdout and "--no-deps --require-hashes" in plan.stdout
    assert "--no-build-isolation --no-deps -e ." in plan.stdout


def test_make_demo_without_a_compiler_is_one_sentence_and_a_half_made_environment_is_finished(tmp_path):
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    line = ["make", "demo", f"VENV={tmp_path / 'venv'}"]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=usual | {"CXX": "absent-compiler"})
    said, stopped = ended.stderr.splitlines()
    assert said.startswith("A C++ compiler is needed, and absent-compiler is not there; install one")
    assert stopped.startswith("make: ***") and not (tmp_path / "venv").exists()
    stub, half_made = tmp_path / "python", tmp_path / "venv" / "bin" / "python"  # without pip, as Ctrl-C leaves it
    half_made.parent.mkdir(parents=True)
    stub.write_text(f'#!/bin/sh\n[ "$1" = -c ] || {{ echo "$@" > {tmp_path}/asked; exit 1; }}\n')
    half_made.write_text("#!/bin/sh\nexit 1\n")
    for path in (stub, half_made):
        path.chmod(0o755)
    assert subprocess.run([*line, f"PYTHON={stub}"], cwd=ROOT, capture_output=True, env=usual).returncode == 2
    assert (tmp_path / "asked").read_text() == f"-m venv {tmp_path / 'venv'}\n"


def commands():
    yield "datasetdm_fast", "--help"
    yield "datasetdm_fast", "--version"
    yield "datasetdm_fast.compat.showlab", "--help"
    for module, _ in cli.COMMANDS.values():
        yield module, "--help"


# Each command in a fork of one interpreter, which costs less than as many interpreters. Told are its exit code, what it
# says, the modules that are then loaded, and processor seconds, to which those before the fork belong, too.
ASKING = """
import contextlib, io, json, os, resource, runpy, sys
import datasetdm_fast.command_line.flags
earlier = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
for module, flag in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if not os.fork():
        sys.argv, said, code = [module, flag], io.StringIO(), None
        with contextlib.redirect_stdout(said):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code
        seconds = earlier + sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        with open(write, "w") as answer:
            json.dump([code, said.getvalue(), list(sys.modules), seconds], answer)
        os._exit(0)
    os.close(write)
    with open(read) as answer:
        print(answer.read())
    os.wait()
"""


def test_help_and_version_answer_at_once():
    """By processor seconds: unlike the clock, they do not grow with what else the machine is doing."""

    def too_slow(asked):
        ran = python("-c", ASKING, json.dumps(asked))
        for (module, flag), line in zip(asked, ran.stdout.splitlines(), strict=True):
            code, said, loaded, seconds = json.loads(line)
            assert code == 0, (module, ran.stderr)
            assert datasetdm_fast.__version__ in said if flag == "--version" else said.startswith("usage:"), module
            assert module.split(".")[0] in loaded, module
            assert not {"torch", "diffusers", "transformers", "yaml"}.intersection(loaded), module
            if seconds >= 1:
                yield module, flag

    assert list(too_slow(list(too_slow(list(commands()))))) == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_says_the_version(name, capsys):
    assert cli.main([name, "--version"]) == 0 and datasetdm_fast.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 3, "a file or standard output: No space left on device"),
    ],
)
def test_a_standard_output_that_takes_nothing_is_no_bug(ending, code, said):
    line = f'"{sys.executable}" -m datasetdm_fast --help {ending}'
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.partition("\n")[0]) == (code, said)


def test_an_unknown_command_is_refused_in_two_lines(capsys):
    assert cli.main(["generat"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[0] == "datasetdm-fast: unknown command 'generat' (did you mean generate?)"
    )
    assert cli.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert cli.main(["generate", "--sede", "1"]) == 2
    assert "did you mean --seed?" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_programs_with_scripts_of_others_are_commands_too(name, capsys):
    assert cli.main(["--help"]) == 0 and f"  {name}  " in capsys.readouterr().out
    assert cli.main([name, "frob"]) == 2 and f"python -m datasetdm_fast.{name}: " in capsys.readouterr().err


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


def test_make_installs_only_files_whose_digests_are_locked(tmp_path):
    """All but torch, of which each machine brings its own build."""
    locks = [ROOT / "requirements.lock", ROOT / "tests" / "requirements.lock"]
    read = [[line for line in lock.read_text().splitlines() if line[0] != "#"] for lock in locks]
    assert [line.split("==")[0] for line in sum(read, []) if "--hash" not in line] == ["torch"]
    entry = re.compile(r'[\w-]+==\S+( ; sys_platform == "linux")?( --hash=sha256:[0-9a-f]{64})+')
    assert [line[:60] for line in sum(read, []) if not entry.fullmatch(line) and not line.startswith("torch==")] == []
    names = [{normal(line.split("==")[0]) for line in lines} for lines in read]
    assert names[0] == needed_by_the_product(), "what make demo installs is what the package itself needs"
    assert not names[0] & names[1] and {"pytest", "triton", "ray", "tensorrt-rtx", "pyarrow"} <= names[1]
    rehearsed = ["make", "--dry-run", "venv", f"VENV={tmp_path / 'new'}"]
    plain = {
        name: text for name, text in os.environ.items() if name not in ("MAKEFLAGS", "TORCH", "PIP_FLAGS", "HASHES")
    }
    said = subprocess.run(rehearsed, cwd=ROOT, env=plain, capture_output=True, text=True, check=True).stdout
    installs = [line for line in said.splitlines() if " install " in line and "torch==" not in line]
    assert "--no-deps --require-hashes -r" in installs[0] and installs[1].endswith("--no-deps -e ."), said
    assert "test-requirements.txt" in installs[2] and len(installs) == 3
    demo = subprocess.run([*rehearsed[:2], "demo", rehearsed[3]], cwd=ROOT, env=plain, capture_output=True, text=True)
    assert "test-requirements.txt" not in demo.stdout and "-e ." in demo.stdout, demo.stderr


def test_the_locked_versions_are_what_every_package_asks_for():
    """PyTorch 2.11, the oldest that is supported, asks for an older setuptools than later ones."""
    lines = [line for lock in (ROOT / "requirements.lock", ROOT / "tests" / "requirements.lock") for line in open(lock)]
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", "".join(lines), re.MULTILINE))
    locked = {normal(name): version for name, version in locked.items() if name != "triton"}  # torch's own stays
    asked = [("torch", "setuptools<82")]
    for found in importlib.metadata.distributions():
        name = normal(found.metadata["Name"])
        if locked.get(name) == found.version:  # a newer one may ask for newer ones
            asked += [(name, line) for line in found.requires or ()]
    wrong = []
    for name, line in asked:
        requirement = Requirement(line)
        is_asked = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        version = locked.get(normal(requirement.name))
        if is_asked and version and not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} asks for {line}, {version} is locked")
    assert len(asked) > 100 and wrong == []


def needed_by_the_product() -> set[str]:
    """The packages that ours and its build ask for, and those that they ask for in turn, on this platform."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    waiting, found = [*project["project"]["dependencies"], *project["build-system"]["requires"]], {}
    while waiting:
        requirement = Requirement(waiting.pop())
        name, extras = normal(requirement.name), {"", *requirement.extras}
        if extras <= found.get(name, set()):
            continue
        found[name] = found.get(name, set()) | extras
        for line in importlib.metadata.requires(name) or ():
            marker = Requirement(line).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in found[name]):
                waiting.append(line)
    return {name for name in found if not name.startswith(("nvidia", "cuda", "triton"))}  # of torch's own build


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this folder is no checkout of git")
def test_a_clone_holds_no_link_and_nothing_that_git_is_told_to_ignore():
    listed = ["git", "-c", f"safe.directory={ROOT}", "ls-files"]
    links, ignored = (
        subprocess.run([*listed, *flags], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        for flags in (["-s"], ["-ic", "--exclude-standard"])
    )
    assert len(links) > 500
    assert [line for line in links if line.startswith("120000")] == [] == ignored


def copy_of_the_sources(copy):
    """A checkout of this commit in another folder."""
    files = ("MANIFEST.in", "LICENSE", "README.md", "SECURITY.md", "requirements.lock", "Makefile")
    for name in ("setup.py", "pyproject.toml", *files):
        shutil.copyfile(ROOT / name, copy / name)
    for name in ("csrc", *MAPPED, "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored, copy_function=shutil.copyfile)
    if not LONG:  # to pack all bytes of the weights takes most of a build, and tells no more of it than the first
        for weights in copy.rglob("*.safetensors"):
            os.truncate(weights, min(weights.stat().st_size, 4096))
    return copy


# Compiler and linker of the short form: the extension comes out as `make` has built it from the same sources.
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
case "$2" in *.so) cp "$BUILT" "$2" ;; *) : > "$2" ;; esac
"""


def build_wheel(sources, target):
    """The wheel that pip builds of a folder."""
    options = ["--no-build-isolation", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "-v"]
    environment = {**os.environ, "DATASETDM_CUDA": "0"}
    if not LONG:
        compiler = sources.parent / "compiler"
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        environment |= {"CC": str(compiler), "CXX": str(compiler), "BUILT": _C.__file__}
    result = python("-m", "pip", "wheel", ".", *options, "-w", str(target), cwd=sources, env=environment)
    assert result.returncode == 0, result.stderr
    assert re.search(r"compiling \d+ units of C\+\+ and none of CUDA, \d+ at a time", result.stderr)
    return next(target.glob("*.whl"))


@pytest.mark.parametrize(("date", "said"), [("", ""), ("yesterday", "SOURCE_DATE_EPOCH is 'yesterday'; it must be")])
def test_the_date_of_a_build_is_a_number_or_the_usual_one(date, said):
    environment = {**os.environ, "SOURCE_DATE_EPOCH": date}
    result = python("setup.py", "-q", "--version", cwd=ROOT, env=environment)
    assert result.returncode == bool(said), result.stderr
    assert said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process to some of the cores")
def test_a_build_starts_no_more_compilers_than_there_are_cores_for_it(tmp_path):
    line = "taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "setup.py", "build_ext"
    environment = {**os.environ, "DATASETDM_CUDA": "0", "CC": "false", "CXX": "false"}
    result = subprocess.run(
        [*line, "--build-temp", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode and "none of CUDA, 1 at a time" in result.stdout, result.stderr


def build_sdist(sources):
    result = python("setup.py", "-q", "sdist", cwd=sources)
    assert result.returncode == 0, result.stderr
    return next((sources / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy = copy_of_the_sources(tmp_path_factory.mktemp("source"))
    return build_wheel(copy, copy / "dist")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The sdist of another folder, whose files have other modes and dates, made under another umask."""
    other = tmp_path_factory.mktemp("a folder of another name")
    before = os.umask(0o077)
    try:
        copy_of_the_sources(other)
        for file in (other / "datasetdm_fast").rglob("*.py"):
            os.utime(file, (1e9, 1e9))
        return build_sdist(other)
    finally:
        os.umask(before)


def test_sdists_of_one_commit_are_equal_bytes(packed, tmp_path):
    assert packed.read_bytes() == build_sdist(copy_of_the_sources(tmp_path)).read_bytes()
    with tarfile.open(packed) as archive:
        entries = archive.getmembers()
    assert [entry.name for entry in entries] == sorted((entry.name for entry in entries), key=PurePath)
    assert {(entry.uid, entry.uname, entry.mtime) for entry in entries} == {(0, "", 1_577_836_800)}
    assert not any(PurePath(entry.name).parts[1:2] == ("tests",) for entry in entries)


@pytest.mark.skipif(not LONG, reason="the long form only")
def test_wheels_of_one_commit_are_equal_bytes(wheel, packed, tmp_path):
    """The other wheel is built of the sdist, in another folder and under another umask."""
    before = os.umask(0o077)
    try:
        subprocess.run(["tar", "-xf", packed, "-C", tmp_path], check=True)  # tarfile has no filters in Python 3.11.2
        again = build_wheel(tmp_path / packed.name.removesuffix(".tar.gz"), tmp_path / "dist")
    finally:
        os.umask(before)
    assert again.read_bytes() == wheel.read_bytes()
    assert (
        str(wheel.parents[1]).encode()
        not in zipfile.Path(wheel, f"datasetdm_fast/{Path(_C.__file__).name}").read_bytes()
    )


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


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of an environment that has the wheel, and everything else from the one of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    interpreter = folder / "bin/python"
    command = ["-m", "pip", "--python", str(interpreter), "--disable-pip-version-check", "install", "--no-deps"]
    result = python(*command, "--no-index", str(wheel))
    assert result.returncode == 0, result.stderr
    libraries = [path for path in sys.path if path.endswith("-packages")]  # no finder of the checkout is run there
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return interpreter


def run_installed(interpreter, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(interpreter), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=cwd, env=environment)


@long_test
def test_the_installed_wheel_runs_from_an_empty_folder(installed, tmp_path):
    code = (
        "import datasetdm_fast, datasetdm_fast.kernels as k, datasetdm_fast.export as e, datasetdm_fast._C as c; "
        "print(k.__file__, e.__file__, c.__file__, sep='\\n')"
    )
    paths = run_installed(installed, "-c", code, cwd=tmp_path)
    assert paths.returncode == 0, paths.stderr
    assert all(Path(path).is_relative_to(installed.parents[1]) for path in paths.stdout.splitlines())
    script = str(installed.with_name("datasetdm-fast"))
    for name in cli.COMMANDS:
        shown = subprocess.run([script, name, "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=900)
        assert (shown.returncode, shown.stdout[:6]) == (0, "usage:"), shown.stderr
    few = ["--steps", "2", "--quiet"]
    lines = [
        ["generate", "--number", "2", *few, "--out", "run"],
        ["audit", "run"],
        ["train", "--data", "demo:4", *few, "--out", "decoder"],
        ["generate", "--number", "1", *few, "--task", "semantic", "--decoder", "decoder", "--out", "own"],
        *([["export", "--out", "engines", "--quiet"]] if find_spec("onnx") else []),
    ]
    code = (
        "import json, sys; from datasetdm_fast.cli import main; "
        "sys.exit(any([main(line) for line in json.loads(sys.argv[1])]))"
    )
    result = run_installed(installed, "-c", code, json.dumps(lines), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "decoder", "own", "engines"}
