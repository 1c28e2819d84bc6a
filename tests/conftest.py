"""Settings every test needs before torch is imported, the skip of GPU tests where there is no GPU, the failure of tests
skipped for a reason that is not listed, and figures at the end.
"""

import fcntl
import gc
import os
import shlex
import signal
import socket
import struct
import sys
import tempfile
from dataclasses import replace
from functools import cache, wraps
from math import prod
from multiprocessing.util import get_temp_dir
from pathlib import Path
from types import SimpleNamespace

# Decided before any import of torch or transformers: no spinning threads, one thread a worker, nothing fetched.
os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"] = "PASSIVE", "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
sys.modules.setdefault("openvino_telemetry", None)  # what OpenVINO sends events to its maker with

# Where there is room, files lie in memory: most of a run's time on a disk is spent on waiting until each is written.
MEMORY, ROOM = "/dev/shm", 8 << 30  # bytes for all files, and as many again for the processes
if "TMPDIR" not in os.environ and os.path.isdir(MEMORY):
    place = os.statvfs(MEMORY)
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
    free = min(place.f_bavail * place.f_frsize, available - ROOM)
    if free > ROOM and os.access(MEMORY, os.W_OK) and not place.f_flag & os.ST_NOEXEC:
        os.environ["TMPDIR"], tempfile.tempdir = MEMORY, None

# Ctrl-C is ignored where a shell started the tests in the background, and by all processes that they would start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Libraries are installed without bytecode; where none may be written, every process that imports diffusers takes ten
# seconds more.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Modules make no garbage, and what they hold would be looked through again and again: until all tests are collected.
gc.disable()

import forked  # noqa: E402
import pytest  # noqa: E402
import skips  # noqa: E402

from datasetdm_fast import _C  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "docs" / "site"))  # whose programs are tested, too

forked.retain_freed()

# Read by Triton where a kernel is decorated, so before any kernel file is imported; with a GPU the kernels run there.
if not _C.cuda_device_count():
    os.environ["TRITON_INTERPRET"] = "1"


LASTING = (None, "demo", "demo-dit", "tiny", "random")  # models and decoders that are the same in every folder
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1  # of a network device, <linux/sockios.h>


def has_loopback() -> bool:
    """Whether processes of this machine can talk to each other; in an empty network namespace the device is there, but
    down.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0)
        try:
            (flags,) = struct.unpack_from("h", fcntl.ioctl(probe, GET_FLAGS, request), 16)
            if not flags & UP:
                fcntl.ioctl(probe, SET_FLAGS, struct.pack("16sh14x", b"lo", flags | UP))
        except OSError:
            return False
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """Workers are forked, too: each would spend half of its start on importing libraries."""
    if config.getoption("markexpr") == "core":  # of which these need one
        return
    os.environ[forked.ADDRESS] = str(config._tmp_path_factory.getbasetemp() / "f")
    forked.run(["-c", "pass"])  # the process that forks ends with the one that starts it
    for spec in specs:
        if spec.popen and not spec.python:
            spec.python = shlex.join([sys.executable, "-S", forked.__file__])


def pytest_ignore_collect(collection_path, config):
    """`-m core` reads only files that have such tests: importing the others takes longer than running these."""
    if config.getoption("markexpr") == "core" and collection_path.name.startswith("test_"):
        return "pytest.mark.core" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items):
    if not has_loopback():
        for item in items:
            if item.get_closest_marker("loopback"):
                item.add_marker(pytest.mark.skip(reason="the loopback device is down, and may not be brought up"))
    if _C.cuda_device_count():
        return
    reason = "no CUDA device" if _C.built_with_cuda else "the extension was built without CUDA"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def shorten_launches():
    """Triton's interpreter spends most of its time on things that once is enough for, where nothing is compiled in the
    process: its functions take the places of the compiler's at every call, of `tl.sum` as of a kernel; the type of a
    block, its type in NumPy and the shape of a tensor are worked out for every operation. Whether integers overflow is
    worked out, too, and then not looked at.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if not interpreter or "TRITON_INTERPRET" not in os.environ:
        return
    language, types = interpreter.tl, {}
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda kernel: interpreter._LangPatchScope()
    make = language.block_type.__init__

    def make_once(block, element, shape):
        key = element.name, *(getattr(size, "value", size) for size in shape)
        if key not in types:
            make(block, element, shape)
            types[key] = dict(vars(block))
        vars(block).update(types[key], element_ty=element)

    language.block_type.__init__ = make_once
    find_type, found = interpreter._get_np_dtype, {}

    def find_once(kind):
        if kind.name not in found:
            found[kind.name] = find_type(kind)
        return found[kind.name]

    interpreter._get_np_dtype = find_once
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    shaped = cache(lambda *shape: (language.constexpr(prod(shape)), language.tuple(map(language.constexpr, shape))))

    def make_tensor(tensor, handle, kind):
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
        tensor.numel, tensor.shape = shaped(*(kind.shape if kind.is_block() else ()))

    language.tensor.__init__ = make_tensor


def pytest_collection_finish():
    shorten_launches()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # networks are made of so many objects that the usual 700 take a tenth of the time
    gc.enable()


def fail_unlisted(report):
    """A skip for a reason that is not listed as a failure; an expected failure is none."""
    if report.skipped and not hasattr(report, "wasxfail") and not skips.is_listed(reason := report.longrepr[2]):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} is skipped for a reason that is not listed in tests/skips.py: {reason}"
    return report


@pytest.fixture(autouse=True, scope="session")
def temporary_folder(tmp_path_factory):
    """Where tests and the processes that they start leave temporary files, such as reports of bugs: below pytest's."""
    get_temp_dir()  # multiprocessing removes its own at exit, after pytest has removed this one
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("t")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return fail_unlisted((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return fail_unlisted((yield))


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """What the tests convert or build is kept apart from the user's cache, and between two tests."""
    os.environ["DATASETDM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def one_forking_process(tmp_path_factory):
    """All workers of xdist ask the process for programs that they are forks of themselves."""
    os.environ.setdefault(forked.ADDRESS, str(tmp_path_factory.getbasetemp() / "f"))


@pytest.fixture
def pickles_are_read_by_forks(monkeypatch):
    """The confined process that reads a pickle need not import torch. tests/test_loading.py reads some by a new one."""
    from datasetdm_fast.untrusted import pickles

    monkeypatch.setattr(pickles, "subprocess", forked.subprocesses)


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_looked_through_once():
    """A file leaves libraries, parsed sources and caches, up to a million objects: half a second at each collection of
    the files after it.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals_are_given_back():
    """A command that a test ran as the last of its process would end a later test that sends a signal."""
    yield
    if interruption := sys.modules.get("datasetdm_fast.command_line.interruption"):
        assert interruption.SignalWatch.active is None and not interruption.Interruption.blocks


@pytest.fixture(scope="module")
def one_engine_of_a_kind():
    """Commands of a file that ask for the same engine get the one that was opened first. Folders with a relative name
    are read anew, as another test has others of that name.
    """
    from datasetdm_fast.engine import engines

    open_engine, opened = engines.open_engine, {}

    @wraps(open_engine)
    def reopened(model="demo", decoder="demo", *labels, **options):
        is_lasting = all(name in LASTING or os.path.isabs(name) for name in (model, decoder))
        if not is_lasting or options.get("lora") or "loaded" in options:
            return open_engine(model, decoder, *labels, **options)
        key = repr((model, decoder, labels, options))
        if key not in opened:
            opened[key] = open_engine(model, decoder, *labels, **options)
        return opened[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "open_engine", reopened)
        yield


@pytest.fixture(scope="module")
def one_model_of_a_kind():
    """Trainings of a file that name a lasting model get the one that was loaded first, unless its weights changed."""
    from datasetdm_fast.training import session

    load_model, loaded = session.load_model, {}

    def reloaded(model, **options):
        if model not in LASTING:
            return load_model(model, **options)
        key = repr((model, options))
        if key not in loaded or any(network.changes for network in loaded[key].networks.values()):
            loaded[key] = load_model(model, **options)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_model", reloaded)
        yield


@pytest.fixture(scope="module")
def tiny_has_one_layer():
    """The tiny model of a file has one layer a block, which is less than half of its U-Net."""
    from small_unets import with_small_unet

    from datasetdm_fast.engine.loading import PRESETS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", lambda size, load=PRESETS["tiny"]: with_small_unet(load(size)))
        yield


def pytest_terminal_summary(terminalreporter):
    """Figures that tests recorded under "told": what a passing test prints itself is not shown."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    told = [line for report in reports for name, line in getattr(report, "user_properties", ()) if name == "told"]
    if told:
        terminalreporter.section("told by the tests")
        for line in dict.fromkeys(told):
            terminalreporter.write_line(line)
