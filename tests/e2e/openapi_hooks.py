"""Hooks of schemathesis for test_tools.py: what a running server is asked for, and what its streams must hold.

The description speaks of any model; here it is narrowed to the model served, so that requests which keep to it reach
the engine and must be answered. What no JSON Schema can say (that min_tokens is at most max_tokens, say) is put right in
these requests alone; those meant to be wrong stay as they are.
"""

import json
import os

import jsonschema_rs
import schemathesis

MODEL = os.environ["OPENAPI_TEST_MODEL"]
VOCAB_SIZE = int(os.environ["OPENAPI_TEST_VOCAB_SIZE"])
MAX_LOGPROBS = 5  # the server's --max-logprobs
MOST_TOKENS = 24  # of an answer: a test's time
TOKEN_ID = "A token id of the model's vocabulary."

document = {}  # as served, with the limits of narrow()


def narrow(schema):
    """The limits that the description leaves to the model and the server's options."""
    if isinstance(schema, list):
        for item in schema:
            narrow(item)
    elif isinstance(schema, dict):
        if schema.get("description") == TOKEN_ID:
            schema["maximum"] = VOCAB_SIZE - 1
        for name, value in schema.items():
            if name in ("logprobs", "top_logprobs", "prompt_logprobs") and "minimum" in value:
                value["maximum"] = MAX_LOGPROBS
            narrow(value)


@schemathesis.hook
def before_load_schema(context, raw_schema):
    schemas = raw_schema["components"]["schemas"]
    narrow(schemas)
    for name in ("CompletionRequest", "ChatRequest"):
        schemas[name]["properties"]["model"] = {"enum": [MODEL]}
    for name in ("TokenizeRequest", "DetokenizeRequest"):
        schemas[name]["properties"]["model"] = {"enum": [MODEL, None]}
    raw_schema["security"] = [{"key": []}]  # the server was started with one
    document.update(json.loads(json.dumps(raw_schema)))
    for path in raw_schema["paths"].values():  # events are not one JSON value: stream_conformance() reads them
        for operation in path.values():
            operation["responses"]["200"].get("content", {}).get("text/event-stream", {}).pop("schema", None)


def whole(value):
    """Token ids and seeds as plain integers: to JSON Schema 5.0 is one, too."""
    if isinstance(value, list):
        return [whole(v) for v in value]
    return int(value) if isinstance(value, float) and value == int(value) else value


def clip(body, name, least, most):
    if body.get(name) is not None:
        body[name] = max(least, min(body[name], most))


def clip_bytes(words, most):
    return [w.encode()[:most].decode(errors="ignore") for w in words]


def without_nul(value):
    """No string of a request may hold one, whatever a text of token ids has."""
    if isinstance(value, dict):
        return {without_nul(k): without_nul(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nul(v) for v in value]
    return value.replace("\0", "0") if isinstance(value, str) else value


def relate_lengths(body):
    if "messages" in body:  # without a number it goes to the end of the context
        body["max_completion_tokens"] = body.get("max_completion_tokens") or body.get("max_tokens") or MOST_TOKENS
    clip(body, "max_completion_tokens", 1, MOST_TOKENS)
    clip(body, "max_tokens", 0 if "prompt" in body else 1, MOST_TOKENS)
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    clip(body, "min_tokens", 0, 16 if most is None else most)


def relate_choices(body):
    clip(body, "n", 1, 3)
    clip(body, "best_of", body.get("n") or 1, 4)
    if body.get("stream"):
        body.pop("best_of", None)
    else:
        body.pop("stream_options", None)
    body.pop("suffix", None)  # the demo model has no tokens for it


def relate_strings(body):
    if isinstance(body.get("stop"), str):
        body["stop"] = clip_bytes([body["stop"]], 1024)[0]
    elif body.get("stop"):
        body["stop"] = clip_bytes(body["stop"], 1024)
    if body.get("bad_words"):
        body["bad_words"] = clip_bytes(body["bad_words"], 256)
    if body.get("cache_salt"):
        body["cache_salt"] = clip_bytes([body["cache_salt"]], 1024)[0]


def relate_numbers(body):
    for name in ("top_p", "repetition_penalty"):  # the least that a 32-bit float can tell from 0
        clip(body, name, 1e-30, 2)
    for name in ("prompt", "tokens", "seed"):
        if name in body:
            body[name] = whole(body[name])
    if body.get("logit_bias"):
        body["logit_bias"] = {str(int(k) % VOCAB_SIZE): v for k, v in body["logit_bias"].items() if k.isdecimal()}


def relate_chat(body):
    if "messages" not in body:
        return
    for message in body["messages"]:
        if message["role"] not in ("system", "user", "assistant"):  # the others are not in the demo's template
            message["role"] = "user"
        parts = message.get("content")
        if isinstance(parts, list):
            message["content"] = [{"type": "text", "text": part.get("text", "refused")} for part in parts]
        elif parts is None:
            message["content"] = "x"
        for name in ("tool_calls", "refusal", "reasoning", "reasoning_content"):
            message.pop(name, None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    if body.get("stream"):
        body.pop("prompt_logprobs", None)
    if body.get("continue_final_message"):
        body["add_generation_prompt"] = False
        body["messages"][-1]["content"] = "x"


@schemathesis.hook
def map_case(context, case):
    if case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        case.body = without_nul(case.body)
        for relate in (relate_lengths, relate_choices, relate_strings, relate_numbers, relate_chat):
            relate(case.body)
    return case


def check_schema(name, value):
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    error = next(jsonschema_rs.validator_for(schema).iter_errors(value), None)
    assert error is None, f"{name}: {error}: {json.dumps(value)[:300]}"


@schemathesis.check
def stream_conformance(context, response, case):
    """A stream's events are chunks as described, of whole choices, and the last is [DONE]."""
    if "text/event-stream" not in response.headers.get("content-type", [""])[0]:
        return
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", ""), f"ends with {response.text[-100:]!r}"
    finished = {}
    for event in events:
        assert event.startswith("data: "), event
        chunk = json.loads(event[6:])
        check_schema("ChatChunk" if "chat" in case.path else "CompletionChunk", chunk)
        for choice in chunk["choices"]:
            finished[choice["index"]] = choice["finish_reason"]
    assert finished and all(finished.values()), finished


@schemathesis.check
def acceptance(context, response, case):
    """positive_data_acceptance lets 404 and others pass; a right request for what is served has one answer."""
    if case.meta and case.meta.generation.mode.is_positive and case.method == "POST":
        assert response.status_code == 200, f"{response.status_code} {response.text[:300]}"
