"""Ctrl-C and SIGTERM while the main thread is in a call of a library, which runs no handler of Python's."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rendered import document, rendered

from datasetdm_fast import convert, filter, merge
from datasetdm_fast.command_line import interruption
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.folder import RunFolder

# A call that lasts until its lock is free and lets other threads run, as a convolution does, and what stands around it.
CALL = "library.pthread_mutex_lock(lock)"
ALONE = f"print('ready', flush=True); {CALL}"
IN_A_BATCH = f"print('ready', flush=True)\n    with interruption.Interruption(False):\n        {CALL}"
IN_A_LANE = f"""pool = ThreadPoolExecutor(1)
    work = pool.submit(lambda: {CALL})
    print('ready', flush=True)
    work.result()"""
RUN = """
import ctypes, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from datasetdm_fast.command_line import interruption
from datasetdm_fast.command_line.ending import run_command

signal.signal(signal.SIGINT, signal.default_int_handler)
library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(lock)
interruption.HANDLING_SECONDS = {patience}
{before}

def command(arguments):
    {body}
    return 0

sys.exit(run_command(command))
"""


def started(body, before="", patience=0.3):
    """A process of one command that has come to its long call."""
    line = [sys.executable, "-c", RUN.format(body=body, before=before, patience=patience)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(line, **pipes, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    return process


@pytest.mark.parametrize(
    ("body", "number", "code"),
    [
        (ALONE, signal.SIGINT, 130),
        (ALONE, signal.SIGTERM, 143),
        (IN_A_BATCH, signal.SIGTERM, 143),
        (IN_A_LANE, signal.SIGINT, 130),
    ],
)
def test_a_call_that_lasts_minutes_is_ended(body, number, code):
    process = started(body)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    assert errors.split("\n")[-2] == "interrupted; run the same command again"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_command_is_imported_ends_it_in_one_line(tmp_path, number, code):
    (tmp_path / "numpy.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    line = [sys.executable, "-m", "datasetdm_fast.generate"]
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(line, cwd=tmp_path, **pipes, **heard)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "\ninterrupted; run the same command again\n")


ON_A_GPU = "interruption._is_on_gpu = lambda: True"
FINISHING = "finishing this batch; once more ends at once\n"


def test_a_batch_that_a_gpu_finishes_is_waited_for_until_the_second_signal():
    process = started(IN_A_BATCH, before=ON_A_GPU)
    process.send_signal(signal.SIGINT)
    assert [process.stderr.readline() for _ in range(2)] == ["\n", FINISHING]
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith("run the same command again\n")


def test_a_handler_that_runs_late_is_not_a_second_signal():
    body = """with interruption.Interruption(False) as block:
        free = lambda: (sys.stdin.read(), library.pthread_mutex_unlock(lock))
        threading.Thread(target=free).start()
        print('ready', flush=True)
        library.pthread_mutex_lock(lock)
        print(block.signal)"""
    process = started(body, before=ON_A_GPU)
    process.send_signal(signal.SIGTERM)
    assert [process.stderr.readline() for _ in range(2)] == ["\n", FINISHING]
    said, errors = process.communicate(timeout=60)  # which ends the call
    assert (process.returncode, said, errors) == (0, "15\n", "")


def test_the_signal_of_a_forked_child_ends_no_parent():
    body = """child = os.fork()
    if not child:
        try:
            time.sleep(60)
        except SystemExit:
            os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    print('ready', flush=True)
    time.sleep(1)"""
    process = started(body)
    assert process.wait(60) == 0


def test_an_import_that_makes_another_error_of_it_is_no_bug():
    body = """print('ready', flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError('partially initialised module') from None"""
    process = started(body)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "bug" not in errors


def test_a_signal_while_an_extension_loads_is_no_fault_of_it():
    before = "from datasetdm_fast.config import ENGINES; from importlib.metadata import EntryPoint"
    body = """ENGINES.others['slow'] = EntryPoint('slow', 'slow:SLOW', 'datasetdm_fast.engine.engines')
    print('ready', flush=True)
    ENGINES.guard('slow', lambda: time.sleep(60))"""
    process = started(body, before)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and errors == "interrupted; run the same command again\n"


def test_a_signal_that_is_ignored_stays_ignored():
    process = started("print('ready', flush=True); time.sleep(1)", before="signal.signal(2, signal.SIG_IGN)")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


LATE = "write=os.write, sleep=time.sleep: (write(1, b'ready\\n'), sleep(0.8), write(1, b'slept\\n'))"
IN_AN_EXIT_FUNCTION = f"import atexit\n    atexit.register(lambda {LATE})"
IN_THE_LAST_STEP = f"sys.kept = type('Late', (), dict(__del__=lambda self, {LATE}))()"


@pytest.mark.parametrize("body", [IN_AN_EXIT_FUNCTION, IN_THE_LAST_STEP])
def test_the_exit_code_of_a_command_that_is_done_stays_though_python_has_not_ended(body):
    process = started(body)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "slept\n", "")


def test_two_signals_at_its_end_end_it_at_once():
    process = started(IN_AN_EXIT_FUNCTION.replace("0.8", "600"))
    while process.poll() is None:  # two that a busy machine hands over together are one
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.returncode == 130 and "slept" not in process.communicate()[0]


@pytest.mark.parametrize(
    "command, flags, told",
    [
        (convert, ["--to", "coco"], "not complete; resume with"),
        (merge, ["other"], "0 of 8 samples are there; resume with"),
        (filter, [], "the same command resumes"),
    ],
)
def test_a_command_that_was_stopped_ends_with_the_code_of_its_signal_and_resumes(
    tmp_path, monkeypatch, capsys, command, flags, told
):
    for name, first in (("run", 0), ("other", 4)):
        with RunFolder(tmp_path / name, document(4, 32)) as folder:
            samples = [rendered(k, 32) for k in range(first, first + 4)]
            requests = [replace(sample.request, index=k) for k, sample in enumerate(samples)]
            folder.add([replace(each, request=request) for each, request in zip(samples, requests, strict=True)], {})
            finish_run(folder)
    line = [str(tmp_path / "run"), *(str(tmp_path / flag) if flag == "other" else flag for flag in flags)]
    line += ["--out", str(tmp_path / "out")] if command is not filter else []

    def enter(self):
        self.signal = signal.SIGTERM
        return self

    with monkeypatch.context() as patch:
        patch.setattr(interruption.Interruption, "__enter__", enter)
        assert command.main([*line, "--quiet"]) == 143
    assert told in capsys.readouterr().err and command.main([*line, "--quiet"]) == 0


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_from_before_a_command_ends_it_as_it_begins(number, ending):
    watch = interruption.SignalWatch(is_last=False)
    watch.open()
    watch.signal = number
    with pytest.raises(ending):
        watch.open()
