"""scripts/soak.py in short: that it runs, and that it finds nothing."""

import subprocess
import sys
import unittest

import harness
from test_proxies import program


@unittest.skipIf(harness.QUICK, "it is long there")
@harness.not_on_a_gpu("two replicas and the reference share it, and the last digits may differ")
class Soak(unittest.TestCase):
    def test_briefly(self):
        command = [sys.executable, f"{harness.ROOT}/scripts/soak.py", "--server", harness.SERVER, "--seconds", "10"]
        command += [] if program("haproxy") else ["--direct"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout[-6000:] + done.stderr[-2000:])


if __name__ == "__main__":
    unittest.main()
