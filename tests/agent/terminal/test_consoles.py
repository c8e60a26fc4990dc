"""People at terminals: they start programs, leave, come back; the session has slept meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

from living import PATIENCE_S, await_end, wait_readable
from people import hang_up

if TYPE_CHECKING:
    from living import CommandLine
    from people import Terminals
    from service import Service

ECHO = """
import signal, os, select
# A signal that comes just before read(2) is heard of only behind that: so it is waited for, too.
woken, wakes = os.pipe()
os.set_blocking(wakes, False)
signal.set_wakeup_fd(wakes)
def tell(number, _):
    print('got', signal.Signals(number).name, *os.get_terminal_size())
for name in ('INT', 'TSTP', 'WINCH'):
    signal.signal(getattr(signal, 'SIG' + name), tell)
print('ready')
while True:
    if woken in select.select([0, woken], [], [])[0]:
        os.read(woken, 100)
        continue
    try:
        line = input()
    except EOFError:
        break
    print('heard', line)
    if line.startswith('exit'):
        raise SystemExit(int(line.split()[1]))
"""


def test_repl_goes_on_in_the_midst_of_a_line(
    terminals: Terminals, lzy: CommandLine, service: Service
) -> None:
    """A line half typed in a REPL is there after a hibernation, and a key wakes the session.

    What is typed while it sleeps is delivered once; Ctrl-C works afterwards; its exit status
    becomes that of lzy.
    """
    service.begin().set()
    person = terminals.person("run", "--name", "calm", "--", sys.executable, "-q")
    person.sees("leaves it running")
    terminals.await_screen(">>>")
    person.types("x = 41\r")
    person.types("print('a' * 3, x + ")
    terminals.await_screen("x +")
    person.leaves()
    before = terminals.screen()
    service.do("hibernate")
    assert service.look()["state"] == "hibernated"
    assert terminals.screen() == before
    person = terminals.person("console", "calm")
    person.sees("hibernates; a key wakes it")
    person.types("1)\r")
    person.sees("aaa 42")
    service.await_state("running")  # the agent hears of it after the program has begun to run
    assert terminals.screen().count("aaa 42") == 1
    person.types("while True: pass\r\r")
    terminals.await_screen("pass")
    time.sleep(0.1)
    person.types("\x03")
    person.sees("KeyboardInterrupt")
    person.types("raise SystemExit(7)\r")
    assert person.exit_status() == 7
    service.await_state("failed")


def test_signals_of_the_keyboard_reach_it_before_and_after(
    terminals: Terminals, service: Service
) -> None:
    """Ctrl-C and Ctrl-Z, and changes of the window, in its first life and in its second.

    It leads its session on its terminal again. A window that changed while it slept is told to
    it when it wakes.
    """
    service.begin().set()
    person = terminals.run(ECHO)
    person.sees("ready")
    for round_ in range(2):
        person.types("\x03")
        person.sees("got SIGINT")
        person.types("\x1a")
        person.sees("got SIGTSTP")
        person.resizes(30 + round_, 100)
        person.sees(f"got SIGWINCH 100 {30 + round_}")
        if round_ == 0:
            service.do("hibernate")
            person.sees("hibernates; a key wakes it")
            person.resizes(20, 50)
            service.wait_until(lambda: terminals.look()["rows"] == 20, "its window has changed")
            service.do("wake")
            person.sees("got SIGWINCH 50 20")
    pid = service.look()["pid"]
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert fields[2:4] == [str(pid), str(pid)]
    assert fields[5] == str(pid)
    assert os.readlink(f"/proc/{pid}/fd/0") == terminals.look()["device"]
    person.types("exit 3\r")
    assert person.exit_status() == 3


def test_line_that_the_kernel_holds(terminals: Terminals, service: Service) -> None:
    """Half a line that no program has read yet, and a whole one, wait in the terminal itself."""
    code = "import sys, time\nprint('ready')\nwhile not open('go').read(): time.sleep(0.02)\n"
    code += "print('lines', [sys.stdin.readline() for _ in range(2)])"
    folder = terminals.lzy.home.parent
    (folder / "go").write_text("")
    service.begin().set()
    person = terminals.run(f"import os; os.chdir({str(folder)!r})\n{code}")
    person.sees("ready")
    person.types("whole\rha")
    terminals.await_screen("ha")
    service.do("hibernate")
    service.do("wake")
    person.types("lf\r")
    (folder / "go").write_text("go")
    person.sees("lines ['whole\\n', 'half\\n']")
    assert person.exit_status() == 0


def test_progress_bar_goes_on_in_its_row(terminals: Terminals, service: Service) -> None:
    """A bar with colours, drawn over and over in one row: the next console shows it as it is."""
    code = "import sys\nfor n in range(11):\n"
    code += "  print(f'\\r\\x1b[32m{\"#\" * n}\\x1b[0m {n * 10}%', end='', flush=True)\n"
    code += "  sys.stdin.readline() if n in (5, 9) else None\nprint()"
    service.begin().set()
    person = terminals.run(f"import os; os.system('stty -echo')\n{code}")
    person.sees("50%")
    person.leaves()
    service.do("hibernate")
    person = terminals.person("console", "calm")
    person.sees("\x1b[0;32m#####\x1b[0m 50%")
    service.do("wake")
    person.types("\r")
    person.sees("90%")
    assert terminals.screen()[0] == "######### 90%"
    person.types("\r")
    person.sees("100%")
    assert person.exit_status() == 0


def test_two_consoles(terminals: Terminals, service: Service) -> None:
    """Both see everything; the window is that of who typed last; one leaves, the other stays."""
    service.begin().set()
    first = terminals.run(ECHO, rows=24, columns=80)
    first.sees("ready")
    second = terminals.person("console", "calm", rows=40, columns=120)
    second.sees("ready")
    first.sees("got SIGWINCH 120 40")
    first.types("one\r")
    for person in (first, second):
        person.sees("heard one")
    assert terminals.look()["consoles"] == 2
    assert (terminals.look()["rows"], terminals.look()["columns"]) == (24, 80)
    second.leaves()
    first.types("\x1d\x1dtwo\r")
    first.sees("heard \x1dtwo")
    first.types("exit 0\r")
    assert first.exit_status() == 0
    service.await_state("ended")


def test_full_screen_program(terminals: Terminals, service: Service) -> None:
    """The second screen with its cursor comes back; leaving gives the shell its own again."""
    code = "print('below'); print('\\x1b[?1049h\\x1b[?2004h\\x1b[3;5Hfull', end='', flush=True)\n"
    code += "input(); print('\\x1b[?1049l', end='')"
    service.begin().set()
    person = terminals.run(code)
    person.sees("full")
    person.types("\x1dd")
    person.sees("\x1b[?2004l")
    person.sees("\x1b[?1049l")
    assert person.exit_status() == 0
    service.do("hibernate")
    look = terminals.look()
    assert look["is_alternate"]
    assert look["screen"][2] == "    full"
    assert look["cursor"] == {"row": 2, "column": 8}
    person = terminals.person("console", "calm")
    person.sees("below")
    person.sees("\x1b[?1049h")
    person.sees("full")
    person.types("\r")
    assert person.exit_status() == 0


def test_top(terminals: Terminals, service: Service) -> None:
    """top(1) paints itself again when it wakes, in the window that there is then; `q` ends it."""
    service.begin().set()
    person = terminals.person("run", "--name", "calm", "--", "top", "-d", "0.2", rows=20)
    person.sees("Cpu")
    assert "top - " in terminals.screen()[0]
    service.do("hibernate")
    person.sees("hibernates; a key wakes it")
    shown = terminals.screen()
    person.resizes(30, 90)
    person.types(" ")
    paints = [], shown[:1]  # before that it takes off what was there
    service.wait_until(lambda: terminals.screen()[:1] not in paints, "its clock goes on")
    service.wait_until(lambda: len(terminals.screen()) > 20, "it fills its window")
    person.types("q")
    assert person.exit_status() == 0


def test_agent_is_killed_while_somebody_types(
    terminals: Terminals, lzy: CommandLine, service: Service
) -> None:
    """The terminal does not need the agent: typing goes on; the next agent knows the session."""
    service.begin().set()
    person = terminals.run(ECHO)
    person.sees("ready")
    service.kill()
    person.types("alone\r")
    person.sees("heard alone")
    service.begin()
    assert service.look()["state"] == "running"
    service.do("hibernate")
    service.kill()
    person.types("wake up\r")
    service.begin()
    person.sees("heard wake up")
    person.types("exit 0\r")
    assert person.exit_status() == 0


def test_keepers_are_killed(terminals: Terminals, service: Service) -> None:
    """Either of the two: the other starts it again, consoles come back, the program runs on.

    Both at once: the terminal hangs up, as any terminal does, and its program gets SIGHUP.
    """
    service.begin().set()
    person = terminals.run(ECHO)
    person.sees("ready")
    service.do("hibernate")
    pid = service.do("wake")["session"]["pid"]  # whoever starts anew must find its second life
    for which in (1, 0, 1):
        before = terminals.keepers()
        terminals.look()
        os.kill(before[which], signal.SIGKILL)
        terminals.await_other_keepers(before)
        person.types(f"after {which}\r")
        person.sees(f"heard after {which}")
        assert service.look()["pid"] == pid
    hang_up(terminals.keepers())
    ended = service.await_state("failed")
    assert os.WTERMSIG(ended["exit_status"]) == signal.SIGHUP
    assert person.exit_status() == 1


def test_terminal_is_made_anew(terminals: Terminals, service: Service) -> None:
    """Nobody keeps the terminal of a session that sleeps: the wake makes one that is like it.

    Settings, window and screen are what they were, and the program leads its session on it.
    """
    code = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    code += "os.system('stty -echo'); print('quiet'); input(); print('heard it')\n"
    code += "print(os.get_terminal_size()); signal.pause()"
    service.begin().set()
    person = terminals.run(code, rows=31, columns=77)
    person.sees("quiet")
    person.leaves()
    service.do("hibernate")
    keepers = terminals.keepers()
    hang_up(keepers)
    for pid in keepers:
        await_end(pid)
    (terminals.lzy.home / "terminals" / "calm.screen").unlink()  # as on another machine
    service.do("wake")
    assert terminals.keepers() != keepers
    person = terminals.person("console", "calm", rows=31, columns=77)
    person.sees("quiet")
    person.types("secret\r")
    person.sees("columns=77, lines=31")
    assert terminals.screen()[:2] == ["quiet", "heard it"]
    person.types("\x03")
    assert person.exit_status() == 130


def test_program_of_another_terminal_wakes_on_one_of_ours(
    terminals: Terminals, service: Service
) -> None:
    """It was only attached, on somebody's terminal; after a hibernation a console reaches it."""
    import pexpect

    other = pexpect.spawn(sys.executable, ["-u", "-c", ECHO], timeout=PATIENCE_S, encoding="utf-8")
    try:
        other.expect_exact("ready")
        service.begin().set()
        service.client.post("/v1/sessions", {"pid": other.pid, "name": "calm"})
        service.wait_until(lambda: service.look()["image"], "its first checkpoint is taken")
        service.do("hibernate")
        other.expect_exact(pexpect.EOF)
    finally:
        other.close(force=True)
    person = terminals.person("console", "calm")
    person.types("hello\r")
    person.sees("heard hello")
    person.types("\x03")
    person.sees("got SIGINT")
    person.types("exit 0\r")
    assert person.exit_status() == 0


def test_terminal_is_given_back_when_lzy_is_killed(terminals: Terminals, service: Service) -> None:
    """Raw mode does not outlive the console, even if that is killed; the program goes on."""
    service.begin().set()
    terminals.run(ECHO, "--detach").exit_status()
    person = terminals.person("console", "calm")
    person.sees("ready")
    descriptor = person.terminal.child_fd

    def is_raw() -> bool:
        return not termios.tcgetattr(descriptor)[3] & termios.ICANON

    assert is_raw()
    os.kill(person.terminal.pid, signal.SIGKILL)
    service.wait_until(lambda: not is_raw(), "its settings are back")
    again = terminals.person("console", "calm")
    again.sees("ready")
    os.kill(again.terminal.pid, signal.SIGTERM)
    assert again.exit_status() == 0
    assert service.look()["state"] == "running"


def test_shell_with_jobs(terminals: Terminals, service: Service) -> None:
    """A shell, a stopped job and one in the foreground sleep and wake together.

    Ctrl-C and Ctrl-Z reach the job that they reached before; the shell goes on with job control.
    """
    service.begin().set()
    person = terminals.person("run", "--name", "calm", "--", "bash", "--norc")
    person.types("PS1='%''% '\r")
    person.sees("%% ")
    person.types("echo go; cat\r")
    person.sees("\rgo\r\n")  # only now the terminal is as programs have it, not as editors do
    person.types("one\r")
    person.sees("one\r\none")
    person.types("\x1a")
    person.sees("Stopped")
    person.sees("%% ")
    person.types("echo on; cat -u\r")
    person.sees("\ron\r\n")
    person.types("two\r")
    person.sees("two\r\ntwo")
    service.do("hibernate")
    person.sees("hibernates; a key wakes it")
    person.types("three\r")
    person.sees("three\r\nthree")
    person.types("\x03")
    person.sees("%% ")
    person.types("echo $?; jobs\r")
    person.sees("130")
    person.sees("Stopped")
    person.sees("%% ")
    person.types("fg\r")
    person.sees("cat\r\n")
    person.types("four\r")
    person.sees("four\r\nfour")
    person.types("\x1a")
    person.sees("Stopped")
    person.sees("%% ")
    person.types("fg\r")
    person.sees("cat\r\n")
    person.types("five\r")
    person.sees("five\r\nfive")
    person.types("\x04")
    person.sees("%% ")
    person.types("exit 6\r")
    assert person.exit_status() == 6


def test_wake_that_fails(terminals: Terminals, service: Service) -> None:
    """A key wakes it in vain: the console says why, the key is forgotten, another tries again."""
    folder = terminals.lzy.home.parent
    (folder / "open").write_text("as it was")
    service.begin().set()
    person = terminals.run(f"kept = open({str(folder / 'open')!r})\n{ECHO}")
    person.sees("ready")
    service.do("hibernate")
    person.sees("hibernates; a key wakes it")
    (folder / "open").write_text("another")
    person.types("in vain\r")
    person.sees("calm cannot be woken: ")
    assert terminals.look()["unread_input_bytes"] == 0
    (folder / "open").unlink()
    (folder / "open").write_text("as it was")
    os.utime(folder / "open", (1, 1))
    service.await_state("hibernated")
    person.types("again\r")
    person.sees("calm cannot be woken: ")
    service.do("detach")
    assert person.exit_status() == 0


def test_detached_session_gives_its_terminal_up(terminals: Terminals, service: Service) -> None:
    """Nobody looks after it: if it hibernates its keeper goes; if it runs, its console stays."""
    service.begin().set()
    person = terminals.run(ECHO)
    person.sees("ready")
    service.do("detach")
    person.types("still\r")
    person.sees("heard still")
    service.client.post("/v1/sessions", {"pid": terminals_pid(terminals), "name": "calm"})
    service.wait_until(lambda: service.look()["image"], "its first checkpoint is taken")
    service.do("hibernate")
    person.sees("hibernates; a key wakes it")
    service.do("detach")
    assert person.exit_status() == 0
    service.wait_until(lambda: not (terminals.lzy.home / "terminals/calm.json").exists(), "it goes")


def terminals_pid(terminals: Terminals) -> int:
    """The program on the terminal: the guard's child that is not the host."""
    guard, host = terminals.keepers()
    (pid,) = set(map(int, Path(f"/proc/{guard}/task/{guard}/children").read_text().split())) - {
        host
    }
    return pid


def test_refusals_and_ends(terminals: Terminals, lzy: CommandLine, service: Service) -> None:
    """No agent, no such program, a name that is taken, no terminal; a program that ends at once."""
    assert lzy.fail("run", "--", "true")["kind"] == "no_agent"
    service.begin().set()
    missing = lzy.fail("run", "--", "no-such-program")
    assert (missing["kind"], missing["exit_status"]) == ("not_found", 3)
    terminals.run(ECHO, "--detach").exit_status()
    assert lzy.fail("run", "--name", "calm", "--", "true")["kind"] == "busy"
    assert lzy.fail("console", "nobody")["kind"] == "not_found"
    quick = terminals.person("run", "--", "sh", "-c", "echo quick; exit 5")
    quick.sees("quick")
    assert quick.exit_status() == 5
    killed = terminals.person("run", "--", "sh", "-c", "kill -USR1 $$")
    assert killed.exit_status() == 128 + signal.SIGUSR1
    for _ in range(2):  # the name is free again: it left no image
        again = terminals.person("run", "--name", "again", "--", "sh", "-c", "echo hi; read x")
        again.sees("hi")
        again.types("\r")
        assert again.exit_status() == 0
        service.await_state("ended", "again")
    printed = lzy.run("console", "calm", "--print")
    assert printed.stdout.decode().strip() == "ready"
    assert lzy.succeed("console", "calm")["screen"][0] == "ready"


def test_flood_while_nobody_looks(terminals: Terminals, service: Service) -> None:
    """Three megabytes go by without a console: the end is shown, and memory stays small."""
    code = "for n in range(50000): print('line', n, '.' * 40)\nprint('over'); input()"
    service.begin().set()
    terminals.run(code, "--detach").exit_status()
    terminals.await_screen("over")
    assert terminals.screen()[-3:] == [f"line 49998 {'.' * 40}", f"line 49999 {'.' * 40}", "over"]
    host = terminals.keepers()[1]
    status = Path(f"/proc/{host}/status").read_text()
    resident_kib = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kib < 40_000
    assert wait_readable([os.pidfd_open(host)], 0) == []
