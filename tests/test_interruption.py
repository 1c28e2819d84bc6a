"""Ctrl-C and SIGTERM while the main thread is in a call of a library, which runs no handler of Python's."""

import signal
import subprocess
import sys
import time

import pytest

# A call that lasts many minutes and lets other threads run, as a convolution does, and what stands around it.
CALL = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
ALONE = f"print('ready', flush=True); {CALL}"
IN_A_BATCH = f"print('ready', flush=True)\n    with interruption.Interruption(False):\n        {CALL}"
IN_A_LANE = f"""pool = ThreadPoolExecutor(1)
    work = pool.submit(lambda: {CALL})
    print('ready', flush=True)
    work.result()"""
RUN = """
import hashlib, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from datasetdm_fast.command_line import interruption
from datasetdm_fast.command_line.ending import run_command

signal.signal(signal.SIGINT, signal.default_int_handler)
{before}

def command(arguments):
    {body}
    return 0

sys.exit(run_command(command))
"""


def started(body, before=""):
    """A process of one command that has come to its long call."""
    line = [sys.executable, "-c", RUN.format(body=body, before=before)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
    begin = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    assert errors.split("\n")[-2] == "interrupted; run the same command again"
    assert time.monotonic() - begin < 6  # two seconds, and what a busy machine adds


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_command_is_imported_ends_it_in_one_line(tmp_path, number, code):
    (tmp_path / "numpy.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    line = [sys.executable, "-m", "datasetdm_fast.generate"]
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(line, cwd=tmp_path, **pipes, **heard)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, "\ninterrupted; run the same command again\n")


def test_a_batch_that_a_gpu_finishes_is_waited_for_until_the_second_signal():
    process = started(IN_A_BATCH, before="interruption._is_on_gpu = lambda: True")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finishing this batch; once more ends at once" in errors and errors.endswith("run the same command again\n")


def test_a_handler_that_runs_late_is_not_a_second_signal():
    body = """with interruption.Interruption(False) as block:
        print('ready', flush=True)
        hashlib.pbkdf2_hmac('sha256', b'', b'', 8 * 10**6)
        print(block.signal)"""
    process = started(body, before="interruption._is_on_gpu = lambda: True\ninterruption.PATIENCE = 0.3")
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said, errors.count("finishing")) == (0, "15\n", 1)


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
    time.sleep(3)"""
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
    process = started("print('ready', flush=True); time.sleep(2)", before="signal.signal(2, signal.SIG_IGN)")
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
    process = started(IN_AN_EXIT_FUNCTION.replace("0.8", "60"))
    begin = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - begin < 6
