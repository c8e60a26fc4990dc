"""Programs started by `subprocess`: cat with bytes in it, sleep, shells with pipelines and jobs."""

import functools
import os
import select
import signal
import subprocess
from subprocess import PIPE

from dialogue import PATIENCE_S, Proof, converse
from kin import read_exactly

# The first of the pipeline has ended, and it led the group of both (-m).
PIPELINE = """echo early | { read first; echo began; read second <&%d; echo "$first $second"; }
echo "${PIPESTATUS[@]}"; cat"""
JOB = "sleep 1000 & echo begun; read word; kill $!; wait $!; echo $word $?"


def shell(
    script: str, *options: str, pass_fds: "tuple[int, ...]" = ()
) -> "subprocess.Popen[bytes]":
    command = ["bash", *options, "-c", script]
    return subprocess.Popen(command, stdin=PIPE, stdout=PIPE, pass_fds=pass_fds)


def main() -> None:
    echo = subprocess.Popen(["cat"], stdin=PIPE, stdout=PIPE)
    os.write(echo.stdin.fileno(), b"before\n")
    assert select.select([echo.stdout], [], [], PATIENCE_S)[0]
    os.write(echo.stdin.fileno(), b"and after\n")
    sleep = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    hear, tell = os.pipe()
    pipeline = shell(PIPELINE % hear, "-m", pass_fds=(hear,))
    assert pipeline.stdout.readline() == b"began\n"
    job = shell(JOB)
    assert job.stdout.readline() == b"begun\n"

    def ask(process: "subprocess.Popen[bytes]", words: bytes) -> bytes:
        os.write(process.stdin.fileno(), words)
        return read_exactly(process.stdout.fileno(), len(words))

    @functools.lru_cache(None)
    def finish() -> Proof:
        os.write(tell, b"late\n")
        heard = read_exactly(pipeline.stdout.fileno(), len(b"early late\n0 0\n"))
        os.write(job.stdin.fileno(), b"now\n")
        told = read_exactly(job.stdout.fileno(), 1000)
        return {
            "bytes in cat": read_exactly(echo.stdout.fileno(), 17) == b"before\nand after\n",
            "pipeline": heard == b"early late\n0 0\n" or repr(heard),
            "job of a shell": told == b"now 143\n" or repr(told),
            "its shell": job.wait(PATIENCE_S) == 0,
        }

    def prove() -> Proof:
        return {
            **finish(),
            "cat": ask(echo, b"again\n") == b"again\n",
            "the shell's cat": ask(pipeline, b"once more\n") == b"once more\n",
            "sleep": sleep.poll() is None and os.getsid(sleep.pid) == sleep.pid,
        }

    def spoil() -> None:
        sleep.send_signal(signal.SIGTERM)
        sleep.wait()

    converse(prove, spoil)
    os._exit(0)


main()
