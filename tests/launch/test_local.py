"""The local launcher: statuses, what the user sees, and that nobody stays behind. The workers import no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.launch import local

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def test_workers_get_the_five_variables_and_a_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "outer")
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS TORCHELASTIC_RUN_ID"
    code = f"print(*(os.environ.get(name) for name in '{names}'.split()))"
    assert local.run_workers(python(code), 3, tmp_path) == 0
    seen = [(tmp_path / f"rank-{rank}.log").read_text().split() for rank in range(3)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert [s[:5] for s in seen] == [[str(r), "3", str(r), "3", "127.0.0.1"] for r in range(3)]
    assert len({s[5] for s in seen}) == 1
    assert all(s[6:] == [threads, "None"] for s in seen)


def test_only_rank_0_prints_and_errors_of_others_carry_their_rank(tmp_path, capfd):
    code = "print(f'out {rank}'); print(f'err {rank}', file=sys.stderr); print('same', file=sys.stderr)"
    assert local.run_workers(python(code), 3, tmp_path) == 0
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    lines = sorted(err.splitlines())
    assert [line for line in lines if "err" in line] == ["[rank 1] err 1", "[rank 2] err 2", "err 0"]
    assert len([line for line in lines if "same" in line]) == 1
    logged = (tmp_path / "rank-2.log").read_text().splitlines()
    assert sorted(logged) == ["err 2", "out 2", "same"]  # the two streams are read side by side
    local.run_workers(python(code), 3, tmp_path)
    assert (tmp_path / "rank-2.log").read_text().count("err 2") == 2  # appended


@pytest.mark.parametrize("status", [1, 2, 77])
def test_the_first_failure_ends_the_others_and_gives_its_status(status, tmp_path):
    code = f"sys.exit({status}) if rank == 1 else time.sleep(600)"
    start = time.monotonic()
    assert local.run_workers(python(code), 3, tmp_path) == status
    assert time.monotonic() - start < 9  # grace and SIGTERM, no SIGKILL


def test_the_users_mistake_goes_before_its_consequences(monkeypatch):
    monkeypatch.setattr(local, "_GRACE_S", 20.0)
    assert local.run_workers(python("(time.sleep(0.5), sys.exit(2)) if rank == 1 else sys.exit(1)"), 2, None) == 2


def test_interrupted_workers_give_their_status(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_GRACE_S", 0.0)
    code = "time.sleep(rank / 2); sys.exit(75 if rank < 2 else {})"
    assert local.run_workers(python(code.format(0)), 3, None) == 75  # nobody is ended before his time
    assert local.run_workers(python(code.format(1)), 3, None) == 1


def test_a_worker_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(local, "_TERMINATE_S", 0.5)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "time.sleep(600) if rank else (time.sleep(1), sys.exit(1))"
    start = time.monotonic()
    assert local.run_workers(python(code), 2, None) == 1
    assert time.monotonic() - start < 15


def test_a_worker_that_a_signal_ended_is_named(tmp_path, capfd):
    code = "import signal; os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(600)"
    assert local.run_workers(python(code), 2, tmp_path) == 1
    message = capfd.readouterr().err.strip()
    assert message.startswith("error: rank 1 was ended by SIGKILL") and message.endswith("rank-1.log")


LAUNCHER = """
import sys
from pathlib import Path
from megalm.launch import local
local.sys.platform = sys.argv[2]
sys.exit(local.run_workers([sys.executable, "-c", sys.argv[1]], 2, None))
"""


def start_launcher(code: str, platform: str = sys.platform) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, python(code)[2], platform],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_workers_die_with_a_launcher_that_is_killed(platform, tmp_path):
    code = f"open(f'{tmp_path}/{{rank}}.tmp', 'w').write(str(os.getpid()))\n"
    code += f"os.rename(f'{tmp_path}/{{rank}}.tmp', f'{tmp_path}/{{rank}}.pid'); time.sleep(600)"
    with start_launcher(code, platform) as launcher:
        files = [tmp_path / f"{rank}.pid" for rank in range(2)]
        assert wait_for(lambda: all(file.exists() for file in files))
        if platform != "linux":
            time.sleep(1.0)  # until the watcher reads
        pids = [int(file.read_text()) for file in files]
        launcher.kill()
        assert wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_are_passed_on(number, tmp_path):
    code = f"import signal\nsignal.signal({int(number)}, lambda *_: sys.exit(0))\n"
    code += f"open(f'{tmp_path}/{{rank}}', 'w').close(); time.sleep(600)"
    with start_launcher(code) as launcher:
        assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        launcher.send_signal(number)
        assert launcher.wait(20) == 0


def test_a_signal_that_ends_the_workers_is_the_status(tmp_path):
    code = f"open(f'{tmp_path}/{{rank}}', 'w').close(); time.sleep(600)"
    with start_launcher(code) as launcher:
        assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(20) == 128 + signal.SIGTERM


def test_children_of_workers_are_ended_too(tmp_path):
    code = "import subprocess; child = subprocess.Popen(['sleep', '600'])\n"
    code += f"open('{tmp_path}/pid', 'w').write(str(child.pid)) if rank == 0 else None\nsys.exit(0)"
    assert local.run_workers(python(code), 2, None) == 0
    assert wait_for(lambda: not alive(int((tmp_path / "pid").read_text())), 5)
