"""Where measure.py gets completions from: a running server over HTTP, or transformers on this machine."""

import concurrent.futures
import json
import pathlib
import urllib.error
import urllib.request


class Http:
    """OpenAI's completions API plus POST /tokenize; standard library only."""

    def __init__(self, url, model=None, threads=8, timeout=300):
        self.url, self.threads, self.timeout = url.rstrip("/"), threads, timeout
        self.model = model or self._call("/v1/models")["data"][0]["id"]
        self.max_model_len = self._call("/tokenize", {"prompt": "a", "model": self.model})["max_model_len"]

    def _call(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path}: HTTP {error.code}: {error.read().decode(errors='replace')[:500]}") from error

    def count_tokens(self, text):
        """Tokens of the prompt, begin-of-text included."""
        return self._call("/tokenize", {"prompt": text, "model": self.model})["count"]

    def map(self, function, items):
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(function, items))

    def complete(self, prompts, max_tokens):
        """Greedy completions: [(text, finish_reason)] in the order of the prompts."""
        def one(prompt):
            choice = self._call("/v1/completions", {
                "model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0})["choices"][0]
            return choice["text"], choice["finish_reason"]
        return self.map(one, prompts)


class Local:
    """transformers' LlamaForCausalLM in BF16, on a GPU if there is one, and SentencePiece itself for the text."""

    def __init__(self, path, dtype="bfloat16", rows=32):
        import sentencepiece
        import torch
        import transformers

        self.torch, self.rows = torch, rows
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(pathlib.Path(path) / "tokenizer.model"))
        model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()
        self.max_model_len = model.config.max_position_embeddings
        self.stops = set(model.generation_config.eos_token_id)

    def count_tokens(self, text):
        return 1 + len(self.sp.encode(text))

    def map(self, function, items):
        return [function(item) for item in items]

    def complete(self, prompts, max_tokens):
        """As Http.complete; max_tokens must fit behind every prompt."""
        answers = []
        for start in range(0, len(prompts), self.rows):
            answers += self._batch(prompts[start:start + self.rows], max_tokens)
        return answers

    def _batch(self, prompts, max_tokens):
        """Prompts of any lengths at once: padded on the left, and the padding masked."""
        prompts = [[self.sp.bos_id(), *self.sp.encode(prompt)] for prompt in prompts]
        width = max(len(ids) for ids in prompts)
        ids = self.torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = self.torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        with self.torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False,
                                      pad_token_id=0)
        return [self._answer(prompt, new) for prompt, new in zip(prompts, out[:, width:].tolist())]

    def _answer(self, prompt, new):
        end = next((i for i, token in enumerate(new) if token in self.stops), None)
        text = self.sp.decode(prompt[1:] + new[:end])[len(self.sp.decode(prompt[1:])):]
        return text, "length" if end is None else "stop"
