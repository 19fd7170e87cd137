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
    """transformers' LlamaForCausalLM in BF16, and SentencePiece itself for the text."""

    def __init__(self, path, dtype="bfloat16"):
        import sentencepiece
        import torch
        import transformers

        self.torch = torch
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(pathlib.Path(path) / "tokenizer.model"))
        self.model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.max_model_len = self.model.config.max_position_embeddings
        self.stops = set(self.model.generation_config.eos_token_id)

    def count_tokens(self, text):
        return 1 + len(self.sp.encode(text))

    def map(self, function, items):
        return [function(item) for item in items]

    def complete(self, prompts, max_tokens):
        return [self._one(prompt, max_tokens) for prompt in prompts]

    def _one(self, prompt, max_tokens):
        ids = [self.sp.bos_id(), *self.sp.encode(prompt)]
        new, cache, reason = [], None, "length"
        feed = ids
        with self.torch.inference_mode():
            for _ in range(min(max_tokens, self.max_model_len - len(ids))):
                out = self.model(self.torch.tensor([feed]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                token = int(out.logits[0, -1].argmax())
                if token in self.stops:
                    reason = "stop"
                    break
                new.append(token)
                feed = [token]
        return self.sp.decode(ids[1:] + new)[len(prompt):], reason
