"""systemd itself, a user's instance in namespaces of its own, with the units of configs/systemd."""

import http.client
import json
import os
import re
import subprocess
import tempfile
import unittest

import harness
from harness import scale, wait_until
from test_proxies import free_port
from test_service import Load

# As the user's instance expects it: a system that systemd has booted, a directory for its sockets.
MANAGER = """
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/user/0 && chmod 700 /run/user/0 && cd / || exit 1
/lib/systemd/systemd --user &
wait
"""
# What differs from a system's: a user's instance has no users and no mounts to give, things are elsewhere, and a test has no half
# minute to wait for the watchdog.
SERVICE = """
[Service]
DynamicUser=no
ProtectSystem=no
ProtectHome=no
PrivateTmp=no
ProtectKernelTunables=no
ProtectKernelModules=no
ProtectControlGroups=no
ProtectHostname=no
ProtectKernelLogs=no
ProtectProc=default
ExecStart=
ExecStart={gptd} --model {model} --backend {backend} --log-format json --drain-delay 0 --api-key-file {keys} --stall-timeout 1
WatchdogSec=2
"""
SOCKET = """
[Socket]
ListenStream=
ListenStream=127.0.0.1:{port}
"""
KEY = {"Authorization": "Bearer sk-first"}


def can_run():
    return os.geteuid() == 0 and os.path.exists("/lib/systemd/systemd") and not subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--cgroup", "true"], stderr=subprocess.DEVNULL).returncode


@unittest.skipUnless(can_run(), "needs systemd, and root that may have namespaces")
@harness.not_quick
@harness.not_on_a_gpu("it is about the service manager")
class Systemd(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="gptd-systemd-")
        self.addCleanup(directory.cleanup)
        self.keys, self.port = os.path.join(directory.name, "keys"), free_port()
        self.write_keys("sk-first")
        units = os.path.join(directory.name, ".config", "systemd", "user")
        for kind, more in ("service", SERVICE), ("socket", SOCKET):
            os.makedirs(os.path.join(units, f"gptd.{kind}.d"))
            with open(os.path.join(harness.ROOT, "configs", "systemd", f"gptd.{kind}")) as f:
                unit = f.read()
            with open(os.path.join(units, f"gptd.{kind}"), "w") as f:
                f.write(unit)
            with open(os.path.join(units, f"gptd.{kind}.d", "test.conf"), "w") as f:
                f.write(more.format(gptd=harness.SERVER, model=harness.MODEL, backend=harness.BACKEND, keys=self.keys,
                                    port=self.port))
        self.env = {**harness.NOT_VARIABLES, "HOME": directory.name, "XDG_RUNTIME_DIR": "/run/user/0"}
        self.log = open(os.path.join(directory.name, "log"), "w+")
        self.addCleanup(self.log.close)
        self.manager = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--cgroup", "/bin/sh", "-c", MANAGER],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env={**self.env, "SYSTEMD_LOG_TARGET": "console"})
        self.addCleanup(lambda: (self.manager.kill(), self.manager.wait()))
        try:
            wait_until(lambda: self.systemctl("is-system-running", check=False) in ("running", "degraded"), 10, "systemd runs")
        except AssertionError:
            self.skipTest("systemd does not run here: " + self.said())

    def said(self):
        self.log.seek(0)
        return self.log.read()[-3000:]

    def inside(self, *command, check=True):
        with open(f"/proc/{self.manager.pid}/task/{self.manager.pid}/children") as f:
            inside = f.read().split()
        if not inside:
            return ""
        done = subprocess.run(["nsenter", "--target", inside[0], "--mount", "--pid", "--cgroup", *command],
                              env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertTrue(done.returncode == 0 or not check, f"{command}: {done.stdout}{self.said()}")
        return done.stdout.strip()

    def systemctl(self, *arguments, check=True):
        return self.inside("systemctl", "--user", *arguments, check=check)

    def shown(self, name, unit="gptd.service"):
        return self.systemctl("show", "--value", "--property", name, unit)

    def write_keys(self, *keys):
        with open(self.keys, "w") as f:
            f.writelines(f"{key} name=k{i}\n" for i, key in enumerate(keys))

    def ask(self, key="sk-first"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"model": os.path.basename(harness.MODEL), "prompt": "12+30=", "max_tokens": 4, "temperature": 0, "stop": "\n"}
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        text = json.loads(answer.read())
        connection.close()
        return text["choices"][0]["text"] if answer.status == 200 else answer.status

    def test_life(self):
        self.systemctl("start", "gptd.socket")
        self.assertEqual(self.shown("ActiveState"), "inactive")
        self.assertEqual(self.ask(), "42", "the first client starts it, and waits")
        self.assertEqual((self.shown("ActiveState"), self.shown("StatusText")), ("active", "serving demo"))

        status = self.inside("cat", f"/proc/{self.shown('MainPID')}/status")
        self.assertRegex(status, r"NoNewPrivs:\t1\nSeccomp:\t2\n")  # SystemCallFilter and its like

        self.assertEqual(self.ask("sk-second"), 401)
        self.write_keys("sk-first", "sk-second")
        self.systemctl("reload", "gptd.service")
        self.assertEqual(self.ask("sk-second"), "42")

        load = Load(self.port, "demo", 8, KEY)
        try:
            for _ in range(scale(3, 1)):
                load.progress()
                pid = self.shown("MainPID")
                self.systemctl("restart", "gptd.service")
                self.assertNotEqual(self.shown("MainPID"), pid)
            load.progress()
        finally:
            failures = load.end()
        self.assertEqual(failures, [])

        self.systemctl("kill", "--signal=SIGSTOP", "gptd.service")  # no beat of its watchdog comes any more
        wait_until(lambda: self.shown("NRestarts") == "1", 20, "systemd starts it anew")
        self.assertEqual(self.ask(), "42")

        self.systemctl("stop", "gptd.socket", "gptd.service")
        self.assertEqual([self.shown(name) for name in ("ActiveState", "Result", "ExecMainStatus")], ["inactive", "success", "0"])
        self.assertFalse(re.search(r"gptd\.(service|socket).*(ignoring|Unknown|Failed to parse)", self.said()), self.said())


if __name__ == "__main__":
    unittest.main()
