#!/usr/bin/env python3
"""Builds an image of the Dockerfile without Docker and runs it as Docker would: as its USER, with no capability, on a read-only
root, as process 1. For tests, where no Docker is; needs root and mmdebstrap.

    python3 scripts/check_docker.py [--target cpu|cuda] [--compiled]

The instructions are read from the Dockerfile and carried out in roots made for it (overlays, which leave nothing behind). What is
not as Docker does it: debian:bookworm is a fresh Debian that mmdebstrap makes, by this machine's sources of packages
(build/docker/debian, kept for the next time); nvidia/cuda is this machine's root, which must have the toolkit at the place that is
copied; there are no layers. With --compiled the build stage is given what build/ has, and its `make dist` compiles what is newer.
"""
import argparse
import ctypes
import fnmatch
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEBIAN = os.path.join(ROOT, "build", "docker", "debian")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_MEGABYTES = {"cpu": 100, "cuda": 700}  # of the cuda image without Debian's


def run(*command, **keywords):
    subprocess.run(command, check=True, **keywords)


# ---- the Dockerfile ----

def instructions():
    """(name, rest) of each instruction."""
    with open(os.path.join(ROOT, "Dockerfile")) as f:
        lines = [line for line in f.read().split("\n") if line.strip() and not line.lstrip().startswith("#")]
    for logical in re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n"):
        name, rest = logical.split(None, 1)
        yield name, rest


def ignored(directory, names):
    """What .dockerignore keeps out of the context: names at the top, and **/patterns anywhere."""
    with open(os.path.join(ROOT, ".dockerignore")) as f:
        patterns = [line.strip() for line in f if line.strip() and not line.startswith("#")]
    top = [p for p in patterns if not p.startswith("**/")]
    anywhere = [p[3:] for p in patterns if p.startswith("**/")]
    assert not [p for p in top + anywhere if "/" in p or p.startswith("!")], "a pattern that this script does not know"
    patterns = anywhere + (top if os.path.samefile(directory, ROOT) else [])
    return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


class Image:
    """A stage: its root and what is said about how to run it."""

    def __init__(self, root, of=None):
        self.root = root
        self.env = dict(of.env) if of else {"PATH": DEFAULT_PATH}
        self.workdir = of.workdir if of else "/"
        self.user, self.entrypoint, self.command, self.health, self.stop_signal, self.ports = "0:0", [], [], None, None, []

    def path(self, inside):
        return self.root + os.path.join(self.workdir, inside)


class Builder:
    def __init__(self, arguments, directory):
        self.arguments, self.directory, self.stages = arguments, directory, {}

    def build(self, target):
        """Carries out the stages up to the target, but those that it does not need."""
        needed, stage = self.needed(target), None
        for name, rest in instructions():
            if name == "FROM":
                base, _, stage = rest.split()
                if stage in needed:
                    self.stages[stage] = self.start(stage, base)
            elif stage in needed:
                began = time.monotonic()
                getattr(self, "do_" + name.lower())(self.stages[stage], rest)
                if name == "RUN":
                    print(f"  {stage}: RUN {rest[:70]}: {time.monotonic() - began:.1f} s", flush=True)
        return self.stages[target]

    @staticmethod
    def needed(target):
        uses, stage = {}, None
        for name, rest in instructions():
            if name == "FROM":
                base, _, stage = rest.split()
                uses[stage] = {base}
            elif match := re.match(r"--from=(\S+)", rest):
                uses[stage].add(match.group(1))
        known, more = set(), {target}
        while more:
            known |= more
            more = {u for s in more for u in uses[s] if u in uses} - known
        return known

    def start(self, stage, base):
        root = os.path.join(self.directory, stage)
        of = self.stages.get(base)
        if base == "scratch":
            os.makedirs(root)
            return Image(root)
        lower = of.root if of else "/" if base.startswith("nvidia/") else self.debian(base)
        parts = [root, root + ".upper", root + ".work"]
        for part in parts:
            os.makedirs(part)
        run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={parts[1]},workdir={parts[2]}", root)
        return Image(root, of)

    def debian(self, base):
        assert base.startswith("debian:bookworm"), f"{base}: not a base that can be had here"
        if not os.path.exists(os.path.join(DEBIAN, "complete")):
            began = time.monotonic()
            shutil.rmtree(DEBIAN, ignore_errors=True)
            os.makedirs(os.path.dirname(DEBIAN), exist_ok=True)
            sources = next(f for f in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list") if os.path.exists(f))
            run("mmdebstrap", "--quiet", "--variant=minbase", "bookworm", DEBIAN, sources)
            # apt in there goes where apt goes here.
            for name in ("apt.conf.d", "keyrings", "trusted.gpg.d"):
                if os.path.isdir(os.path.join("/etc/apt", name)):
                    shutil.copytree(os.path.join("/etc/apt", name), os.path.join(DEBIAN, "etc/apt", name), dirs_exist_ok=True)
            shutil.copy("/etc/resolv.conf", os.path.join(DEBIAN, "etc"))
            open(os.path.join(DEBIAN, "complete"), "w").close()
            print(f"  debian:bookworm: {time.monotonic() - began:.1f} s", flush=True)
        return DEBIAN

    def do_workdir(self, image, rest):
        image.workdir = os.path.join(image.workdir, rest)
        os.makedirs(image.path(""), exist_ok=True)

    def do_copy(self, image, rest):
        words = shlex.split(rest)
        stage = words.pop(0)[len("--from="):] if words[0].startswith("--from=") else None
        *sources, target = words
        to = image.path(target)
        for source in sources:
            at = self.stages[stage].root + source if stage else os.path.normpath(os.path.join(ROOT, source))
            if os.path.isdir(at):
                # Docker copies what is in a directory, not the directory.
                shutil.copytree(at, to, symlinks=True, dirs_exist_ok=True, ignore=None if stage else ignored)
            else:
                os.makedirs(to if target.endswith("/") else os.path.dirname(to), exist_ok=True)
                shutil.copy2(at, to)
        if not stage and sources == ["."] and self.arguments.compiled:
            compiled = [e.path for e in os.scandir(os.path.join(ROOT, "build")) if re.match("gptd$|obj$|lib", e.name)]
            os.makedirs(to + "/build")
            run("cp", "-a", "-t", to + "/build", *compiled)

    def do_run(self, image, rest):
        inside = {name: os.path.join(image.root, name) for name in ("proc", "dev")}
        for name, path in inside.items():
            run("mount", "--rbind", f"/{name}", path)
        more = {k: v for k, v in os.environ.items() if k.lower() in ("http_proxy", "https_proxy", "no_proxy")}
        done = subprocess.run(["chroot", image.root, "/bin/sh", "-c", f"cd {shlex.quote(image.workdir)} && {rest}"],
                              env={"HOME": "/root", **image.env, **more}, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for path in inside.values():
            run("umount", "--recursive", "--lazy", path)
        if done.returncode:
            sys.exit(f"{done.stdout[-4000:]}\ncheck-docker: RUN {rest}: exit status {done.returncode}")

    def do_env(self, image, rest):
        for word in shlex.split(rest):
            name, value = word.split("=", 1)
            image.env[name] = value

    def do_expose(self, image, rest):
        image.ports += [int(p) for p in rest.split()]

    def do_user(self, image, rest):
        assert re.fullmatch(r"\d+:\d+", rest), "USER by numbers: Kubernetes' runAsNonRoot knows no names"
        image.user = rest

    def do_stopsignal(self, image, rest):
        image.stop_signal = getattr(signal, rest)

    def do_healthcheck(self, image, rest):
        image.health = json.loads(rest[rest.index("CMD") + 3:])

    def do_entrypoint(self, image, rest):
        image.entrypoint = json.loads(rest)

    def do_cmd(self, image, rest):
        image.command = json.loads(rest)


# ---- a container ----

def enter(image_json):
    """In namespaces of its own for mounts and processes: makes the root read-only, gives up every right, becomes the program."""
    c = json.loads(image_json)
    root = c["root"]
    uid, gid = (int(n) for n in c["user"].split(":"))
    run("mount", "--make-rprivate", "/")
    run("mount", "--bind", root, root)
    run("mount", "-t", "proc", "proc", root + "/proc")
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", root + "/dev")
    for name in ("null", "zero", "urandom"):
        open(f"{root}/dev/{name}", "w").close()
        run("mount", "--bind", f"/dev/{name}", f"{root}/dev/{name}")
    run("mount", "-o", "remount,ro", root + "/dev")
    run("mount", "-o", "remount,bind,ro", root)
    os.chroot(root)
    os.chdir(c["workdir"])
    libc = ctypes.CDLL(None, use_errno=True)
    PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
    with open("/proc/sys/kernel/cap_last_cap") as f:
        last = int(f.read())
    for capability in range(last + 1):
        assert libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0, capability
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execve(c["argv"][0], c["argv"], c["env"])


class Container:
    def __init__(self, image, argv, **env):
        for name in ("proc", "dev"):  # Docker makes the places of its mounts, too
            os.makedirs(os.path.join(image.root, name), exist_ok=True)
        spec = {"root": image.root, "user": image.user, "workdir": image.workdir, "argv": argv, "env": {**image.env, **env}}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, __file__, "--enter", json.dumps(spec)],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def pid(self):
        """As this machine numbers it."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as f:
            return int(f.read())

    def status(self):
        with open(f"/proc/{self.pid()}/status") as f:
            return dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)

    def wait(self, seconds):
        return self.process.wait(seconds)

    def written(self):
        self.log.seek(0)
        return self.log.read()


def check(right, what, container=None):
    if not right:
        sys.exit(f"check-docker: {what}" + (f"\n{container.written()}" if container else ""))


# ---- what an image must be and do ----

def check_files(target, image, base):
    total = n = 0
    for directory, names, files in os.walk(base):
        for name in names + files:
            s = os.lstat(os.path.join(directory, name))
            if not os.path.islink(os.path.join(directory, name)):
                check(not s.st_mode & 0o6002, f"{directory}/{name}: set-id, or everyone may write to it")
                check(s.st_uid == 0, f"{directory}/{name}: not root's")
            if name in files:
                total, n = total + s.st_size, n + 1
    check(image.user.split(":")[0] != "0", "USER is root")
    check(total < MAX_MEGABYTES[target] * 1e6, f"{total / 1e6:.1f} MB, of {MAX_MEGABYTES[target]} at most")
    return f"{total / 1e6:.1f} MB in {n} files"


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    return connection.getresponse()


def check_running(image):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = {"GPTD_PORT": str(port), "GPTD_KV_CACHE_MEMORY_BYTES": "64M"}

    def healthy():
        return Container(image, image.health, **settings).wait(20) == 0
    check(not healthy(), "HEALTHCHECK finds a server where there is none")
    server = Container(image, image.entrypoint + image.command, **settings)
    try:
        deadline = time.monotonic() + 30
        while not healthy():
            check(server.process.poll() is None and time.monotonic() < deadline, "not healthy after 30 s", server)
            time.sleep(0.1)
        check_rights(server, image)
        check(ask(port, "GET", "/health").status == 200, "/health")
        answer = json.load(ask(port, "POST", "/v1/completions", {
            "model": "demo", "prompt": "12+30=", "max_tokens": 4, "temperature": 0, "stop": "\n"}))
        check(answer["choices"][0]["text"] == "42", f"not the answer to 12+30=: {answer}", server)
        check_stop(server, image, port)
    finally:
        server.process.kill()
    check(not healthy(), "HEALTHCHECK still finds the server")


def check_rights(server, image):
    status = server.status()
    uid, gid = image.user.split(":")
    check(status["NSpid"].split()[-1] == "1", f"not process 1: {status['NSpid']}")
    check((status["Uid"].split(), status["Gid"].split(), status["Groups"].strip()) == ([uid] * 4, [gid] * 4, ""), "whose it is")
    check({int(status[c], 16) for c in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}, "it has capabilities")
    check(status["NoNewPrivs"] == "1", "it may get rights")
    with open(f"/proc/{server.pid()}/mountinfo") as f:
        mounts = [line.split() for line in f]
    check([m[4] for m in mounts if m[5].startswith("rw") and m[4] not in ("/proc", "/dev/null", "/dev/zero", "/dev/urandom")] == [],
          f"it has places to write to: {mounts}")


def check_stop(server, image, port):
    """The stop signal in the midst of a long stream: all of it comes, then the exit status is 0."""
    stream = ask(port, "POST", "/v1/completions", {"model": "demo", "prompt": "Once", "max_tokens": 1500, "n": 12,
                                                   "ignore_eos": True, "stream": True})
    check(stream.status == 200, "the stream")
    text = stream.read(4096)
    os.kill(server.pid(), image.stop_signal)
    try:
        text += stream.read()
    except http.client.IncompleteRead as error:
        text += error.partial
    check(text.endswith(b"data: [DONE]\n\n") and text.count(b'"finish_reason":"length"') == 12,
          f"cut: ...{text[-300:]!r}", server)
    check(server.wait(30) == 0, f"ended with {server.process.returncode}", server)
    check("draining" in server.written(), "it did not drain", server)


def check_cuda(image):
    """Without a GPU the library is loaded, with its cuBLASLt, and finds no driver."""
    server = Container(image, image.entrypoint + ["--backend", "cuda"])
    check(server.wait(60) == 3 and "cublas" not in server.written(), "--backend cuda without a GPU", server)
    return server.written().strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--enter", help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.enter:
        return enter(arguments.enter)
    with open("/etc/os-release") as f:
        on_debian = "\nID=debian\n" in f.read()
    lacking = "root, for the mounts" if os.geteuid() else "Debian with mmdebstrap" if not (
        on_debian and shutil.which("mmdebstrap")) else ""
    if not lacking and subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], stderr=subprocess.DEVNULL).returncode:
        print("check-docker: skipped: this machine allows nobody mounts and processes of his own")
        return 0
    if lacking:
        print(f"check-docker: skipped: needs {lacking}")
        return 1 if os.environ.get("CI") else 0
    if not arguments.inside:  # mounts of its own, which end with it
        with tempfile.TemporaryDirectory(prefix="gptd-docker-") as directory:
            return subprocess.run(["unshare", "--mount", sys.executable, *sys.argv, "--inside", directory]).returncode
    began = time.monotonic()
    run("mount", "-t", "tmpfs", "tmpfs", arguments.inside)
    image = Builder(arguments, arguments.inside).build(arguments.target)
    size = check_files(arguments.target, image, image.root if arguments.target == "cpu" else image.root + ".upper")
    check_running(image)
    if arguments.target == "cuda":
        print(f"check-docker: without a GPU: {check_cuda(image)}")
    print(f"check-docker: the {arguments.target} image ({size}) serves as {image.user}, read-only, without capabilities, and "
          f"drains: {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
