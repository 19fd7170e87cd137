"""Each call into the kernel that a request causes fails once, in turn (failing_io.c). Whoever met it gets an answer, an error or a
closed connection, never half of an answer for a whole one; the next request gets what it always gets, and everything comes back.
Memory: tests/test_server_memory.c does the same with allocations."""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import subprocess
import tempfile
import unittest

import harness
import wire
from harness import Server, read_to_end, scale, wait_until

CALLS = ["accept4", "recv", "send", "sendmsg", "epoll_ctl", "epoll_wait", "poll", "read", "write", "shutdown", "setsockopt",
         "socket", "bind", "listen", "eventfd", "epoll_create1", "pthread_create", "open"]
CUT = 0  # instead of an errno: a write of half of it

# What nobody may notice, and what may cost a connection.
UNSEEN = {"accept4": [errno.EINTR, errno.ECONNABORTED, errno.EPROTO, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM],
          "recv": [errno.EINTR], "send": [errno.EINTR], "sendmsg": [errno.EINTR], "epoll_wait": [errno.EINTR],
          "poll": [errno.EINTR, errno.ENOMEM], "read": [errno.EINTR], "write": [errno.EINTR, errno.EIO, errno.ENOSPC, CUT],
          "setsockopt": [errno.ENOBUFS], "shutdown": [errno.ENOTCONN]}
FATAL = {"recv": [errno.ECONNRESET, errno.ENOMEM], "send": [errno.ECONNRESET, errno.EPIPE, errno.ENOBUFS],
         "sendmsg": [errno.ECONNRESET, errno.EPIPE, errno.ENOBUFS], "epoll_ctl": [errno.ENOMEM, errno.ENOSPC]}


class Control(ctypes.Structure):
    _fields_ = [("call", ctypes.c_int), ("error", ctypes.c_int), ("before", ctypes.c_int), ("failed", ctypes.c_int)]


@contextlib.contextmanager
def failing():
    """(the environment of a server, its Control)"""
    with tempfile.TemporaryDirectory(prefix="failing-") as directory:
        library, path = os.path.join(directory, "failing_io.so"), os.path.join(directory, "control")
        source = os.path.join(os.path.dirname(__file__), "failing_io.c")
        subprocess.run(["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o", library, source], check=True)
        with open(path, "w+b") as f:
            f.write(bytes(Control(before=-1)))
            f.flush()
            control = Control.from_buffer(mmap.mmap(f.fileno(), ctypes.sizeof(Control)))
        yield {"LD_PRELOAD": library, "FAILING_IO": path, "ASAN_OPTIONS": "verify_asan_link_order=0"}, control


def arm(control, call, error, before):
    control.call, control.error, control.failed = CALLS.index(call), error, 0
    control.before = before


def disarm(control):
    control.before = -1
    return control.failed


@harness.not_on_a_gpu("whose driver makes calls of its own")
class WhileItRuns(unittest.TestCase):
    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        env, self.control = stack.enter_context(failing())
        self.server = Server("--deterministic", "--slow-client-timeout", "5", env=env)
        self.addCleanup(lambda: self.server.process.poll() is None and self.server.kill())
        fields = {"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
        body = {"model": self.server.name, **fields}
        last = "Connection: close"
        self.requests = {
            "whole": wire.request("POST", "/v1/completions", {**body, "logprobs": 1}, last),
            "streamed": wire.request("POST", "/v1/completions", {**body, "stream": True}, last),
            "in chunks": wire.request("POST", "/v1/chat/completions", {"model": self.server.name, "max_tokens": 2, "temperature": 0,
                                      "messages": [{"role": "user", "content": "Hi"}]}, last, chunks=[1, 20]),
            "one of two": wire.request("GET", "/v1/models") + wire.request("POST", "/tokenize", {"prompt": "x" * 9000}, last),
            "metrics": wire.request("GET", "/metrics", None, last),
            "asked first": wire.request("POST", "/tokenize", {"prompt": "Once"}, "Expect: 100-continue", last),
        }
        for kind in scale([], ["whole", "metrics", "asked first"]):
            del self.requests[kind]
        self.wanted = {kind: self.essence(self.ask(kind)) for kind in self.requests}

    def ask(self, kind):
        with self.server.socket(timeout=8) as s:
            with contextlib.suppress(OSError):
                s.sendall(self.requests[kind])
            _, got, closed = read_to_end(s)
        self.assertTrue(closed, f"{kind}: {self.now}: no end: {got[-300:]}")
        return got

    now = "at first"

    def essence(self, got):
        """What is the same each time in the answers to a kind; the last is None where there is less than a whole one."""
        answers, rest = wire.split_answers(got)
        out = []
        for status, headers, body in answers:
            if status == 200 and headers["Content-Type"].startswith("text/plain"):
                out.append((status, "gptd_num_requests_running" in body.decode()))
            elif headers["Content-Type"].startswith("text/event-stream"):
                events = harness.parse_events(body)
                out.append((status, harness.join_events(events)))
            else:
                value = json.loads(body)
                if isinstance(value, dict):
                    for name in ("id", "created"):
                        value.pop(name, None)
                out.append((status, value))
        return [*out, None] if rest or not out else out

    def check(self, kind, got, unseen):
        wanted = self.wanted[kind]
        if unseen:
            self.assertEqual(self.essence(got), wanted, self.now)
            return
        try:
            answers = self.essence(got)
        except (AssertionError, harness.StreamError):  # a stream that was cut, and says so, or does not end
            self.assertNotIn(b"[DONE]", got, self.now)
            return
        for answer, right in zip(answers, wanted):
            if answer is not None and answer[0] < 400:
                self.assertEqual(answer, right, self.now)

    def state(self):
        pid = self.server.process.pid
        state = self.server.get("/debug/state").json()
        return {"files": len(os.listdir(f"/proc/{pid}/fd")), "threads": len(os.listdir(f"/proc/{pid}/task")),
                "connections": state["connections"], "exchanges": state["exchanges"]}

    def fail_each(self, errors, unseen):
        n, before = 0, {}

        def alone():
            before.update(self.state())
            return before["connections"] == 1
        wait_until(alone, 5, "those who asked first have gone")
        for call, numbers in errors.items():
            for number in numbers:
                for kind in self.requests if call != "accept4" else ["streamed"]:
                    for nth in range(200):
                        self.now = f"{call} {nth} gives {errno.errorcode.get(number, 'less')}"
                        arm(self.control, call, number, nth)
                        got = self.ask(kind)
                        reached = disarm(self.control)
                        self.check(kind, got, unseen)
                        if not reached:
                            break
                        n += 1
                        self.assertEqual(self.essence(self.ask(kind)), self.wanted[kind], f"after {self.now}")
            self.server.wait_idle()
            wait_until(lambda: self.state() == before, 5, f"after {self.now} everything is as it was: {before}, {self.state()}")
        print(f"\n{n} calls failed")
        self.assertGreater(n, scale(50, 25))
        self.server.check_stopped()

    def test_what_nobody_sees(self):
        self.fail_each(UNSEEN, True)

    def test_what_costs_a_connection(self):
        self.fail_each(FATAL, False)


@harness.not_on_a_gpu("whose driver makes calls of its own")
class AtItsStart(unittest.TestCase):
    def test_it_says_so(self):
        """It serves, or ends with a status and words of its own."""
        errors = {"socket": errno.EMFILE, "bind": errno.EACCES, "listen": errno.EADDRINUSE, "eventfd": errno.EMFILE,
                  "epoll_create1": errno.EMFILE, "epoll_ctl": errno.ENOSPC, "pthread_create": errno.EAGAIN, "open": errno.EMFILE}
        if harness.QUICK:
            errors = {call: errors[call] for call in ("listen", "epoll_ctl", "pthread_create")}
        statuses = {}
        with failing() as (env, control):
            for call, number in errors.items():
                for nth in range(100):
                    arm(control, call, number, nth)
                    server = Server(env=env, wait=False)
                    server._ready.wait(60)
                    reached = disarm(control)
                    if server.port:
                        self.assertEqual(server.get("/health").status, 200)
                        server.check_stopped()
                    else:
                        status = server.stop(None)
                        self.assertIn(status, (1, 2, 4), f"{call} {nth}: {server.log[-40:]}")
                        self.assertTrue(server.log, f"{call} {nth}: not a word")
                        self.assertNotIn("Sanitizer", "".join(server.log), f"{call} {nth}")
                        statuses.setdefault(call, []).append((status, server.log[-1][-90:]))
                    if not reached:
                        break
        print("\n" + "\n".join(f"{call}: {status} {words}" for call, ends in statuses.items() for status, words in ends))
        self.assertEqual(set(statuses), set(errors))


if __name__ == "__main__":
    unittest.main()
