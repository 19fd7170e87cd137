"""The files for Docker, Kubernetes, Prometheus and Grafana against the program they are for; the server without any right."""

import glob
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import harness
import test_device
import test_proxies
from harness import Server, scale, wait_until
from test_proxies import CONFIGS, free_port, program, tool_environment

sys.path.insert(0, os.path.join(harness.ROOT, "scripts"))
import render_dashboard  # noqa: E402

try:
    import yaml
except ImportError:
    yaml = None
try:
    import kubernetes_validate
except ImportError:
    kubernetes_validate = None

PROBES = {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
WITH_YAML = unittest.skipUnless(yaml, "PyYAML is not installed")


def read(*path):
    with open(os.path.join(CONFIGS, *path)) as f:
        return f.read()


def documents(text):
    return [d for d in yaml.safe_load_all(text) if d]


def gptd(*flags, env=None, seconds=60):
    done = subprocess.run([harness.SERVER, *flags], capture_output=True, text=True, timeout=seconds,
                          env={**harness.NOT_VARIABLES, **(env or {})})
    return done.returncode, done.stdout + done.stderr


def seconds(text):
    return int(re.fullmatch(r"(\d+)s", text).group(1))


def dockerfile():
    with open(os.path.join(harness.ROOT, "Dockerfile")) as f:
        return f.read()


class Probe(unittest.TestCase):
    def probe(self, *flags, **env):
        return gptd("--probe", *flags, env=env, seconds=20 * scale(1, 4))

    def test_well(self):
        server = Server("--api-key", "sk-1")
        self.addCleanup(lambda: server.process.poll() is None and server.kill())
        port = str(server.port)
        self.assertEqual(self.probe("--port", port), (0, ""))
        self.assertEqual(self.probe("--port", port, "--host", "0.0.0.0"), (0, ""))
        with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
            json.dump({"port": 1, "model": "/nowhere", "api-key-file": "/nowhere"}, f)
            f.flush()
            self.assertEqual(self.probe(GPTD_CONFIG=f.name, GPTD_PORT=port), (0, ""))  # as in a container
        server.check_stopped()
        status, text = self.probe("--port", port)
        self.assertEqual(status, 1)
        self.assertIn("Connection refused", text)

    @harness.not_on_a_gpu("a library stands in for the GPU's")
    def test_stuck(self):
        with test_device.faulty() as (path, fail):
            server = Server("--backend", "cuda", "--stall-timeout", "0.4", program=path)
            self.assertEqual(self.probe("--port", str(server.port))[0], 0)
            fail("hang")
            asking = threading.Thread(target=lambda: server.completions(prompt="Once", max_tokens=50))
            asking.start()
            wait_until(lambda: self.probe("--port", str(server.port)) != (0, ""), 10, "the probe fails")
            status, text = self.probe("--port", str(server.port))
            self.assertEqual((status, text), (1, f"gptd: 127.0.0.1:{server.port}: /health: HTTP/1.1 503\n"))
            self.assertEqual(server.stop(), 3)
            asking.join()

    def test_no_answer(self):
        for answer, expected in ((None, "Resource temporarily unavailable"), (b"", "/health: "),
                                 (b"SSH-2.0\r\n", "/health: SSH-2.0")):
            with self.subTest(answer), socket.create_server(("127.0.0.1", 0)) as s:
                answered = threading.Event()

                def serve(answer=answer, s=s, answered=answered):
                    connection, _ = s.accept()
                    with connection:
                        if answer is None:
                            answered.wait(20)
                        else:
                            connection.recv(4096)
                            connection.sendall(answer)
                thread = threading.Thread(target=serve)
                thread.start()
                began = time.monotonic()
                status, text = self.probe("--port", str(s.getsockname()[1]))
                answered.set()
                self.assertEqual(status, 1)
                self.assertIn(expected, text)
                self.assertLess(time.monotonic() - began, 4 * scale(1, 4))
                thread.join()


# Makes every mount read-only that may be, then execs gptd as nobody, without capabilities.
UNPRIVILEGED = """#!/bin/sh
exec unshare --mount /bin/sh -c '
    mount --make-rprivate /
    for place in $(cut -d " " -f 2 /proc/self/mounts); do mount -o remount,bind,ro "$place" 2>/dev/null; done
    exec setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs --bounding-set -all --inh-caps -all "$@"
    ' gptd {gptd} "$@"
"""


@unittest.skipIf(os.geteuid() or subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode,
                 "needs root that may have mounts of its own")
@harness.not_quick
@harness.not_on_a_gpu("whose device files the machine may keep for some")
class Unprivileged(unittest.TestCase):
    def test_nobody_and_nothing_to_write_to(self):
        with tempfile.TemporaryDirectory(prefix="gptd-nobody-") as directory:
            os.chmod(directory, 0o755)  # what is above our own files may be closed to others
            program_copy, wrapper, model = (os.path.join(directory, name) for name in ("gptd", "wrapper", "demo"))
            shutil.copy(harness.SERVER, program_copy)
            shutil.copytree(harness.MODEL, model)
            with open(wrapper, "w") as f:
                f.write(UNPRIVILEGED.format(gptd=program_copy))
            os.chmod(wrapper, 0o755)
            server = Server("--backend", harness.BACKEND, program=wrapper, model=model)
            self.addCleanup(lambda: server.process.poll() is None and server.kill())
            with open(f"/proc/{server.process.pid}/status") as f:
                status = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
            self.assertEqual((status["Uid"].split(), status["CapEff"], status["CapBnd"], status["NoNewPrivs"]),
                             (["65534"] * 4, "0" * 16, "0" * 16, "1"))
            with open(f"/proc/{server.process.pid}/mountinfo") as f:
                mounts = {line.split()[4]: line.split()[5] for line in f}  # of two at one place the last is seen
            writable = [m for m, options in mounts.items() if options.startswith("rw")]
            self.assertFalse([w for w in writable if not w.startswith(("/proc", "/sys", "/dev/pts"))], mounts)
            self.assertTrue(server.stream(prompt="Once upon a time", max_tokens=50, ignore_eos=True))
            self.assertEqual(server.chat("What is 12 plus 30?", temperature=0)["choices"][0]["finish_reason"], "stop")
            server.check_stopped()


@harness.not_quick
class Files(unittest.TestCase):
    """What the files say of gptd, and of each other."""

    @classmethod
    def setUpClass(cls):
        cls.options = set(re.findall(r"^  --(?:\[no-\])?([a-z-]+)", gptd("--help")[1], re.M))

    def check_variables(self, env):
        for name in env:
            self.assertIn(name.removeprefix("GPTD_").lower().replace("_", "-"), self.options, name)

    def check_options(self, *flags, env=None):
        """That gptd takes these, with the demo in the place of another model."""
        status, text = gptd("--model", harness.MODEL, "--backend", "cpu", "--dry-run", *flags, env=env)
        self.assertEqual(status, 0, text)

    @WITH_YAML
    def test_compose(self):
        compose = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", read("docker", "compose.yaml")))
        services, directory = compose["services"], os.path.join(CONFIGS, "docker")
        self.assertEqual(set(services), {"gptd-a", "gptd-b", "haproxy", "prometheus", "grafana"})
        mounted = {}
        for name, s in services.items():
            with self.subTest(name):
                self.assertEqual((s["read_only"], s["cap_drop"], s["security_opt"]), (True, ["ALL"], ["no-new-privileges:true"]))
                self.assertLessEqual(set(s.get("depends_on", [])), set(services))
                self.assertIn("inside", s["networks"])
                for volume in s.get("volumes", []):
                    source, inside, *_ = volume.split(":")
                    mounted[name, inside] = os.path.join(directory, source)
                    self.assertTrue(source in compose["volumes"] or os.path.exists(os.path.join(directory, source)), volume)
        for name in ("gptd-a", "gptd-b"):
            s = services[name]
            self.assertIn(f" AS {s['build']['target']}\n", dockerfile())
            self.assertTrue(os.path.exists(os.path.join(directory, s["build"]["context"], "Dockerfile")))
            self.check_variables(s["environment"])
            self.check_options(env=s["environment"])
            self.assertTrue(os.path.exists(mounted[name, "/models"] + s["environment"]["GPTD_MODEL"].removeprefix("/models")))
            needed = int(s["environment"]["GPTD_DRAIN_DELAY"]) + int(s["environment"]["GPTD_REQUEST_TIMEOUT"])
            self.assertGreater(seconds(s["stop_grace_period"]), needed)
            self.assertGreaterEqual(seconds(services["haproxy"]["stop_grace_period"]), seconds(s["stop_grace_period"]))
        variables = set(re.findall(r"GPTD_\w+", read("haproxy", "haproxy.cfg")))
        self.assertLessEqual(set(services["haproxy"]["environment"]), variables)
        self.assertEqual(sorted(services["haproxy"]["environment"].values()), ["gptd-a:8000", "gptd-b:8000"])
        self.assertIn("presetenv GPTD_BIND :8080", read("haproxy", "haproxy.cfg"))
        self.assertEqual(services["haproxy"]["ports"], ["8080:8080"])
        prometheus = yaml.safe_load(read("prometheus", "prometheus.yml"))
        self.assertEqual(prometheus["scrape_configs"][0]["static_configs"][0]["targets"], ["gptd-a:8000", "gptd-b:8000"])
        self.check_grafana(services["grafana"]["environment"], mounted, prometheus)

    def check_grafana(self, environment, mounted, prometheus):
        provisioning = mounted["grafana", "/etc/grafana/provisioning"]
        with open(os.path.join(provisioning, "datasources", "prometheus.yml")) as f:
            source, = yaml.safe_load(f)["datasources"]
        self.assertEqual(source["url"], "http://prometheus:9090")
        self.assertEqual(source["jsonData"]["timeInterval"], prometheus["global"]["scrape_interval"])
        with open(os.path.join(provisioning, "dashboards", "gptd.yml")) as f:
            provider, = yaml.safe_load(f)["providers"]
        self.assertEqual(os.listdir(mounted["grafana", provider["options"]["path"]]), ["gptd.json"])
        self.assertEqual(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"], provider["options"]["path"] + "/gptd.json")

    @WITH_YAML
    def test_compose_for_gpus(self):
        compose = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", read("docker", "compose.gpu.yaml")))
        gpus = []
        for s in compose["services"].values():
            self.assertIn(f" AS {s['build']['target']}\n", dockerfile())
            self.check_variables(s["environment"])
            device, = s["deploy"]["resources"]["reservations"]["devices"]
            self.assertEqual((device["driver"], device["capabilities"]), ("nvidia", ["gpu"]))
            gpus += device["device_ids"]
        self.assertEqual((sorted(compose["services"]), gpus), (["gptd-a", "gptd-b"], ["0", "1"]))

    @WITH_YAML
    def test_kubernetes(self):
        base = {}
        for path in glob.glob(os.path.join(CONFIGS, "kubernetes", "base", "*.yaml")):
            for d in documents(read(path)):
                base[d["kind"]] = d
        pod = base["Deployment"]["spec"]["template"]
        container, = pod["spec"]["containers"]
        config = json.loads(read("kubernetes", "base", "config.json"))
        labels = pod["metadata"]["labels"]
        for selector in (base["Deployment"]["spec"]["selector"]["matchLabels"], base["Service"]["spec"]["selector"],
                         base["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]):
            self.assertLessEqual(selector.items(), labels.items())
        self.assertEqual(container["ports"], [{"name": "http", "containerPort": config["port"]}])
        self.assertEqual(base["Service"]["spec"]["ports"][0]["targetPort"], "http")
        self.assertEqual({k: v["httpGet"] for k, v in container.items() if k.endswith("Probe")},
                         {k: {"path": v, "port": "http"} for k, v in PROBES.items()})
        self.assertEqual((pod["spec"]["enableServiceLinks"], config["host"]), (False, "0.0.0.0"))
        self.assertGreater(pod["spec"]["terminationGracePeriodSeconds"], config["drain-delay"] + config["request-timeout"])
        ready = container["readinessProbe"]
        self.assertGreater(config["drain-delay"], 2 * ready["periodSeconds"] * ready["failureThreshold"] + ready["timeoutSeconds"])
        security = pod["spec"]["securityContext"]
        self.assertIn(f"USER {security['runAsUser']}:{security['runAsGroup']}\n", dockerfile())
        self.assertEqual((security["runAsNonRoot"], security["seccompProfile"]["type"]), (True, "RuntimeDefault"))
        self.assertEqual(container["securityContext"], {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                        "capabilities": {"drop": ["ALL"]}})
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        self.assertEqual(set(mounts.values()), {v["name"] for v in pod["spec"]["volumes"]})
        self.assertIn("GPTD_CONFIG=" + next(m for m, name in mounts.items() if name == "config") + "/config.json\n", dockerfile())
        self.assertEqual(os.path.dirname(config["api-key-file"]), next(m for m, name in mounts.items() if name == "keys"))
        base_files = yaml.safe_load(read("kubernetes", "base", "kustomization.yaml"))
        self.assertEqual(base_files["configMapGenerator"], [{"name": "gptd", "files": ["config.json"]}])
        monitor, = documents(read("kubernetes", "monitoring", "servicemonitor.yaml"))
        self.assertLessEqual(monitor["spec"]["selector"]["matchLabels"].items(), base["Service"]["metadata"]["labels"].items())
        self.assertEqual(monitor["spec"]["endpoints"][0]["port"], base["Service"]["spec"]["ports"][0]["name"])

    def test_kubernetes_configurations(self):
        with tempfile.NamedTemporaryFile("w") as keys:
            keys.write("sk-1 role=admin\n")
            keys.flush()
            for name in ("base", "gpu"):
                with self.subTest(name):
                    config = os.path.join(CONFIGS, "kubernetes", name, "config.json")
                    self.check_options("--config", config, "--api-key-file", keys.name)

    @WITH_YAML
    @unittest.skipUnless(shutil.which("kubectl"), "kubectl is not installed")
    def test_kustomize(self):
        for name, image in (("base", "gptd:cpu"), ("gpu", "gptd:cuda")):
            with self.subTest(name):
                done = subprocess.run(["kubectl", "kustomize", os.path.join(CONFIGS, "kubernetes", name)],
                                      capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                built = {d["kind"]: d for d in documents(done.stdout)}
                self.check_schemas(built.values())
                self.assertEqual(set(built), {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget"})
                pod = built["Deployment"]["spec"]["template"]["spec"]
                container, = pod["containers"]
                self.assertEqual(container["image"], image)
                self.assertIn({"name": "config", "configMap": {"name": built["ConfigMap"]["metadata"]["name"]}}, pod["volumes"])
                self.assertEqual(built["ConfigMap"]["data"]["config.json"], read("kubernetes", name, "config.json"))
                model = json.loads(built["ConfigMap"]["data"]["config.json"])["model"]
                self.assertTrue(name == "base" or [m for m in container["volumeMounts"] if model.startswith(m["mountPath"] + "/")])
                self.assertEqual(container["resources"]["limits"].get("nvidia.com/gpu"), 1 if name == "gpu" else None)

    def check_schemas(self, resources):
        for r in resources if kubernetes_validate else []:
            if r["kind"] != "Kustomization":
                kubernetes_validate.validate(r, kubernetes_validate.latest_version(), strict=True)

    @WITH_YAML
    @unittest.skipUnless(kubernetes_validate, "kubernetes-validate is not installed")
    def test_kubernetes_schemas(self):
        paths = glob.glob(os.path.join(CONFIGS, "kubernetes", "base", "*.yaml"))
        self.assertGreaterEqual(len(paths), 4)
        for path in paths:
            self.check_schemas(documents(read(path)))


@harness.not_quick
@unittest.skipUnless(program("promtool"), "promtool is not installed")
class Rules(unittest.TestCase):
    def test_promtool(self):
        for arguments in (("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"),
                          ("test", "rules", "alerts_test.yml")):
            done = subprocess.run([program("promtool"), *arguments], cwd=os.path.join(CONFIGS, "prometheus"), capture_output=True,
                                  text=True, timeout=60, env=tool_environment())
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @WITH_YAML
    def test_each_alert_is_tested(self):
        alerts = [r["alert"] for g in yaml.safe_load(read("prometheus", "alerts.yml"))["groups"] for r in g["rules"]]
        fires = {t["alertname"] for test in yaml.safe_load(read("prometheus", "alerts_test.yml"))["tests"]
                 for t in test["alert_rule_test"] if t.get("exp_alerts")}
        self.assertEqual(fires, set(alerts))


@harness.not_quick
@unittest.skipUnless(program("prometheus"), "prometheus is not installed")
class Dashboard(unittest.TestCase):
    """A real Prometheus with configs/prometheus, of which only addresses and intervals are others, over two replicas."""

    def start_prometheus(self, directory, replicas):
        port = free_port()
        for name in ("prometheus.yml", "alerts.yml"):
            text = read("prometheus", name)
            for old, new in (('["gptd-a:8000", "gptd-b:8000"]', json.dumps([f"127.0.0.1:{r.port}" for r in replicas])),
                             ("_interval: 5s", "_interval: 1s")):
                self.assertTrue(name == "alerts.yml" or old in text, old)
                text = text.replace(old, new)
            with open(os.path.join(directory, name), "w") as f:
                f.write(text)
        process = subprocess.Popen(
            [program("prometheus"), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=tool_environment())
        self.addCleanup(lambda: (process.kill(), process.wait()))
        return f"http://127.0.0.1:{port}"

    def ask(self, path, **parameters):
        try:
            return render_dashboard.ask(self.prometheus, path, **parameters)
        except OSError as error:
            if getattr(error, "code", 503) != 503:  # 503, or no connection: it is still starting
                self.fail(f"{parameters}: {error.read()}")
            return []

    def load(self, server, ended):
        """Streams, prompts with a common beginning, more than the queue takes, and clients that leave at once."""
        def client(i):
            while not ended.is_set():
                if i == 0:
                    with server.socket() as s:
                        s.sendall(server.completion_bytes(prompt="Once", max_tokens=2000, ignore_eos=True))
                        time.sleep(0.05)
                else:
                    server.completions(prompt="The cat sat on the mat. " * 20, max_tokens=30, stream=i % 2 == 0)
        threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
        for t in threads:
            t.start()
        return threads

    def test_every_query_has_data(self):
        flags = ("--max-num-seqs", "2", "--max-queue-requests", "1", "--drain-delay", "60")
        replicas = [Server(*flags) for _ in range(2)]
        for r in replicas:
            self.addCleanup(lambda r=r: r.process.poll() is None and r.kill())
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.prometheus = self.start_prometheus(directory.name, replicas)
        ended = threading.Event()
        threads = self.load(replicas[0], ended)
        draining = replicas[1]
        try:
            wait_until(lambda: self.ask("query", query="sum(up)") and draining.get("/ready").status == 200, 20, "it scrapes")
            draining.process.terminate()
            queries = {t["expr"]: p["title"] for p in render_dashboard.panels("8s") for t in p.get("targets", [])}
            # What `or vector(0)` hides: each kind of answer must be there as well.
            queries.update({q.replace(" or vector(0)", ""): title for q, title in list(queries.items())})
            deadline = time.monotonic() + 30
            while queries and time.monotonic() < deadline:
                self.assertEqual(draining.get("/ready").status, 503)
                for query in list(queries):
                    results = self.ask("query", query=query)
                    if results and all(r["value"][1] not in ("NaN", "+Inf", "-Inf") for r in results):
                        del queries[query]
                time.sleep(0.2)
            self.assertEqual(queries, {}, "have no data")
        finally:
            ended.set()
            for t in threads:
                t.join()
        draining.kill()
        down = 'ALERTS{alertname="GptdDown", alertstate="pending"}'
        wait_until(lambda: self.ask("query", query=down), 10, "the alert is on its way")
        broken = self.ask("query", query="prometheus_rule_evaluation_failures_total > 0")
        self.assertEqual(broken, [])


if __name__ == "__main__":
    unittest.main()
