"""A chat front end: Gradio's load_chat, asked through its own HTTP API.

One turn each: Gradio 6.31 puts what this API said before into a form that it then refuses.
"""

import importlib.util
import os
import unittest

import harness
from harness import ServerTest


def message(text):
    return {"text": text, "files": []}


FOX = message("Tell me a story about a fox.")


# See `make check-clients`.
@unittest.skipUnless(importlib.util.find_spec("gradio"), "gradio is not installed (see scripts/setup.sh clients)")
@unittest.skipUnless(os.path.basename(harness.MODEL) == "demo", "the demo model is asked what it knows")
class Gradio(ServerTest):
    @classmethod
    def setUpClass(cls):
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio
        import gradio_client
        super().setUpClass()
        cls.app = gradio.load_chat(f"http://127.0.0.1:{cls.server.port}/v1/", model=cls.server.name, token="none", api_name="chat")
        _, url, _ = cls.app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
        cls.connect = staticmethod(lambda: gradio_client.Client(url, verbose=False))

    @classmethod
    def tearDownClass(cls):
        cls.app.close(verbose=False)
        super().tearDownClass()

    def test_answer_comes_in_steps(self):
        job = self.connect().submit(FOX, api_name="/chat")
        answer = job.result(timeout=60)
        self.assertIn("fox", answer)
        self.assertGreater(len(answer), 100)
        steps = job.outputs()
        self.assertGreater(len(steps), 1)
        self.assertTrue(all(answer.startswith(step) for step in steps))

    def test_one_after_another(self):
        for i in range(10, 15):  # sampled: the front end sets no temperature
            self.assertIn(str(i + 30), self.connect().predict(message(f"What is {i}+30?"), api_name="/chat"))


if __name__ == "__main__":
    unittest.main()
